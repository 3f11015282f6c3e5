"""Patches of megatron.core.fusions.fused_mla_yarn_rope_apply: rotary embedding of multi-head latent attention."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mindspeed_llm.models.stand_ins.transformer_engine.pytorch.attention.rope import packed_positions
from mindspeed_llm.patching import Patch


def _rows(table: Tensor, t: Tensor, cu_seqlens: Tensor | None, cp_rank: int, cp_size: int) -> Tensor:
    """The rows of cos or sin [max_s, 1, 1, d] for t [s, b, n, d], or for packed t [t, n, d]."""
    if cu_seqlens is None:
        return table[: t.shape[0]]
    return table[packed_positions(cu_seqlens, cp_size, cp_rank), 0]


def _rotate(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs of neighbours in, halves out, as DeepSeek's weights are laid out."""
    first, second = t[..., 0::2], t[..., 1::2]
    cos_first, cos_second = cos.chunk(2, dim=-1)
    sin_first, sin_second = sin.chunk(2, dim=-1)
    out = torch.cat((first * cos_first - second * sin_first, second * cos_second + first * sin_second), dim=-1)
    return out.to(t.dtype)


def _check(rotary_interleaved: bool) -> None:
    if rotary_interleaved:
        raise ValueError("rotary_interleaved=True is wrong for the fused rotary embedding; legal: False")


def _queries_without_triton(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    from megatron.core.fusions import fused_mla_yarn_rope_apply

    if fused_mla_yarn_rope_apply.HAVE_TRITON:
        return original

    @functools.wraps(original)
    def fused_apply_mla_rope_for_q(
        t: Tensor,
        cos: Tensor,
        sin: Tensor,
        qk_head_dim: int,
        emb_dim: int,
        cu_seqlens_q: Tensor | None = None,
        cp_rank: int = 0,
        cp_size: int = 1,
        rotary_interleaved: bool = False,
    ) -> Tensor:
        _check(rotary_interleaved)
        cos, sin = (_rows(table, t, cu_seqlens_q, cp_rank, cp_size) for table in (cos, sin))
        plain, turned = t.split([qk_head_dim, emb_dim], dim=-1)
        return torch.cat((plain, _rotate(turned, cos, sin)), dim=-1)

    return fused_apply_mla_rope_for_q


def _keys_without_triton(original: Callable[..., Any]) -> Callable[..., Any]:
    from megatron.core.fusions import fused_mla_yarn_rope_apply

    if fused_mla_yarn_rope_apply.HAVE_TRITON:
        return original

    @functools.wraps(original)
    def fused_apply_mla_rope_for_kv(
        kv: Tensor,
        k_pos_emb: Tensor,
        cos: Tensor,
        sin: Tensor,
        emb_dim: int,
        k_dim: int,
        v_dim: int,
        cu_seqlens_kv: Tensor | None = None,
        cp_rank: int = 0,
        cp_size: int = 1,
        rotary_interleaved: bool = False,
    ) -> tuple[Tensor, Tensor]:
        _check(rotary_interleaved)
        cos, sin = (_rows(table, kv, cu_seqlens_kv, cp_rank, cp_size) for table in (cos, sin))
        key, value = kv.split([k_dim, v_dim], dim=-1)
        turned = _rotate(k_pos_emb, cos, sin).expand(*key.shape[:-1], emb_dim)
        return torch.cat((key, turned), dim=-1), value.contiguous()

    return fused_apply_mla_rope_for_kv


WHY = "it launches a Triton kernel; without triton that is a TypeError about a mock object"
PATCHES = (
    Patch(
        name="mla-rope-of-queries-without-triton",
        target="megatron.core.fusions.fused_mla_yarn_rope_apply:fused_apply_mla_rope_for_q",
        why=WHY,
        wrap=_queries_without_triton,
        fingerprints={"0.15.3": "2b0f94619fb1", "0.16.1": "80e0eaa88708"},
    ),
    Patch(
        name="mla-rope-of-keys-without-triton",
        target="megatron.core.fusions.fused_mla_yarn_rope_apply:fused_apply_mla_rope_for_kv",
        why=WHY,
        wrap=_keys_without_triton,
        fingerprints={"0.15.3": "11dbb2030744", "0.16.1": "e095b947e27d"},
    ),
)
