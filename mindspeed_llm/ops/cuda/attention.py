"""Attention on NVIDIA GPUs: the package flash-attn, and torch's own kernel for documents of different lengths.

torch's scaled_dot_product_attention (ops.attention.sdpa) has the same FlashAttention-2 and cuDNN's kernels for plain
causal attention and stays the choice there. A window or queries behind a cache make it build a mask, a soft cap it does
not have, and packed documents it takes one by one: these go here.
Sources: Dao, arXiv 2307.08691; flash_attn 2.7's flash_attn_func and flash_attn_varlen_func;
torch.nn.attention.varlen.varlen_attn.
"""

from __future__ import annotations

import functools
import inspect

import torch
from torch import Tensor

from mindspeed_llm.ops.attention import all_scores, by_document, sdpa
from mindspeed_llm.ops.registry import register

DEVICES = ("cuda",)
TYPES = (torch.float16, torch.bfloat16)
# Limits of FlashAttention-2: largest head, its steps, and one size for queries, keys and values.
LARGEST_HEAD, HEAD_STEP = 256, 8
# The first generation of GPU that FlashAttention-2 has kernels for (A100).
OLDEST_GPU = (8, 0)
# What is asked of varlen_attn; torch 2.13 has all of it, the first releases of the kernel do not.
VARLEN_OPTIONS = ("scale", "window_size", "enable_gqa")


def fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether FlashAttention-2 takes tensors [..., heads, channels] of this type and these sizes."""
    d = query.shape[-1]
    sizes = d == key.shape[-1] == value.shape[-1] <= LARGEST_HEAD and d % HEAD_STEP == 0
    types = query.dtype in TYPES and query.dtype == key.dtype == value.dtype
    return query.is_cuda and sizes and types and _has_kernels(query.get_device())


@functools.cache
def _has_kernels(index: int) -> bool:
    return torch.cuda.get_device_capability(index) >= OLDEST_GPU


def _window(window_size: int | None) -> tuple[int, int]:
    """Tokens before and after a token that it sees."""
    return (-1, 0) if window_size is None else (window_size - 1, 0)


@register("attention", "flash_attn", devices=DEVICES, requires=("flash_attn",), priority=1)
def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: int | None,
    dropout: float,
    scale: float | None,
    softcap: float | None = None,
) -> Tensor:
    """As `ops.attention.attention`; plain causal attention is left to torch's kernels."""
    if not fits(query, key, value):
        if softcap is None:
            return sdpa(query, key, value, window_size, dropout, scale)
        return all_scores(query, key, value, window_size, dropout, scale, softcap)
    s, s_k = query.shape[0], key.shape[0]
    plain = s == s_k and (window_size is None or window_size >= s_k)
    if plain and softcap is None:
        return sdpa(query, key, value, None, dropout, scale)
    from flash_attn import flash_attn_func

    # Its causal order lets the last query see the last key, as ours does.
    out = flash_attn_func(
        *(x.transpose(0, 1) for x in (query, key, value)),
        dropout_p=dropout,
        softmax_scale=scale,
        causal=True,
        window_size=_window(window_size),
        softcap=softcap or 0.0,
    )
    return out.transpose(0, 1).flatten(2)


def _ends(lengths: list[int], device: torch.device) -> Tensor:
    """Starts of the documents and the total, int32."""
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(device, non_blocking=True)


def why_no_varlen() -> str | None:
    """Why torch's kernel for documents cannot be called; None when it can."""
    from torch.nn.attention.varlen import varlen_attn

    lacking = [name for name in VARLEN_OPTIONS if name not in inspect.signature(varlen_attn).parameters]
    return f"varlen_attn of torch {torch.__version__} has no {', '.join(lacking)}" if lacking else None


@register(
    "packed_attention",
    "varlen_attn",
    devices=DEVICES,
    requires=("torch.nn.attention.varlen",),
    priority=1,
    unless=why_no_varlen,
)
def torch_packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: list[int],
    window_size: int | None,
    dropout: float,
    scale: float | None,
) -> Tensor:
    """All documents in one call of torch's kernel, which has no dropout."""
    if dropout or not lengths or not fits(query, key, value):
        return by_document(query, key, value, lengths, window_size, dropout, scale)
    from torch.nn.attention.varlen import varlen_attn

    ends, longest = _ends(lengths, query.device), max(lengths)
    out = varlen_attn(
        *(x.squeeze(1) for x in (query, key, value)),
        ends,
        ends,
        longest,
        longest,
        scale=scale,
        window_size=_window(window_size),
        enable_gqa=key.shape[2] != query.shape[2],
    )
    return out.flatten(1).unsqueeze(1)


@register("packed_attention", "flash_attn", devices=DEVICES, requires=("flash_attn",), priority=2)
def flash_packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: list[int],
    window_size: int | None,
    dropout: float,
    scale: float | None,
) -> Tensor:
    """All documents in one call of flash-attn's kernel."""
    if not lengths or not fits(query, key, value):
        return by_document(query, key, value, lengths, window_size, dropout, scale)
    from flash_attn import flash_attn_varlen_func

    ends, longest = _ends(lengths, query.device), max(lengths)
    out = flash_attn_varlen_func(
        *(x.squeeze(1) for x in (query, key, value)),
        ends,
        ends,
        longest,
        longest,
        dropout_p=dropout,
        softmax_scale=scale,
        causal=True,
        window_size=_window(window_size),
    )
    return out.flatten(1).unsqueeze(1)
