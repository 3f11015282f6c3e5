"""Patches of megatron.core.transformer.moe.moe_utils."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mindspeed_llm import accelerator
from mindspeed_llm.patching import Patch


def _as_numpy_on_any_device(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        moved = original(tensor, as_numpy, record_stream)
        return moved.numpy() if as_numpy and torch.is_tensor(moved) else moved

    return maybe_move_tensor_to_cpu


def _plain_product_without_transformer_engine(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    from megatron.core.transformer.moe import moe_utils

    if moe_utils.HAVE_TE:
        return original

    @functools.wraps(original)
    def router_gating_linear(inp: Tensor, weight: Tensor, bias: Tensor | None, router_dtype: torch.dtype) -> Tensor:
        bias = None if bias is None else bias.to(router_dtype)
        return F.linear(inp.to(router_dtype), weight.to(router_dtype), bias)

    return router_gating_linear


def _has_kernels() -> bool:
    """Whether Transformer Engine itself is there, whose kernels order tokens, and the device they need."""
    from megatron.core.transformer.moe import moe_utils

    kernel = getattr(moe_utils, "fused_permute", None)
    own = kernel is not None and kernel.__module__.startswith("transformer_engine")
    return own and accelerator.current().name == "cuda"


def _permute_by_operator(original: Callable[..., Any]) -> Callable[..., Any]:
    if _has_kernels():
        return original

    @functools.wraps(original)
    def permute(
        tokens: Tensor,
        routing_map: Tensor,
        probs: Tensor | None = None,
        num_out_tokens: int | None = None,
        fused: bool = False,
        drop_and_pad: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        from mindspeed_llm.ops.moe_permute import moe_permute

        if not fused:
            return original(tokens, routing_map, probs, num_out_tokens, fused, drop_and_pad)
        return moe_permute(tokens, routing_map, probs)

    return permute


def _unpermute_by_operator(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    if _has_kernels():
        return original

    @functools.wraps(original)
    def unpermute(
        permuted_tokens: Tensor,
        sorted_indices: Tensor,
        restore_shape: torch.Size,
        probs: Tensor | None = None,
        routing_map: Tensor | None = None,
        fused: bool = False,
        drop_and_pad: bool = False,
    ) -> Tensor:
        from mindspeed_llm.ops.moe_permute import moe_unpermute, row_order

        if not fused:
            return original(permuted_tokens, sorted_indices, restore_shape, probs, routing_map, fused, drop_and_pad)
        weights = None
        if probs is not None:
            if routing_map is None:
                raise ValueError("unpermute with probs needs the routing map they belong to")
            weights = probs.t().reshape(-1).index_select(0, row_order(routing_map)[1])
        return moe_unpermute(permuted_tokens, sorted_indices, restore_shape[0], weights)

    return unpermute


def _chunks_without_transformer_engine(original: Callable[..., Any]) -> Callable[..., Any]:
    if _has_kernels():
        return original

    @functools.wraps(original)
    def sort_chunks_by_idxs(
        input: Tensor,
        split_sizes: Tensor,
        sorted_idxs: Tensor,
        probs: Tensor | None = None,
        fused: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        return original(input, split_sizes, sorted_idxs, probs, False)

    return sort_chunks_by_idxs


PATCHES = (
    Patch(
        name="moe-permute",
        target="megatron.core.transformer.moe.moe_utils:permute",
        why="the fused form of bringing tokens to experts exists in Transformer Engine only",
        wrap=_permute_by_operator,
        fingerprints={"0.15.3": "fafc39c7f9ff", "0.16.1": "614599e6a58f"},
    ),
    Patch(
        name="moe-unpermute",
        target="megatron.core.transformer.moe.moe_utils:unpermute",
        why="the fused form of adding up what experts gave exists in Transformer Engine only",
        wrap=_unpermute_by_operator,
        fingerprints={"0.15.3": "f6f5cc5fda71", "0.16.1": "c87896a5d07e"},
    ),
    Patch(
        name="moe-sort-chunks",
        target="megatron.core.transformer.moe.moe_utils:sort_chunks_by_idxs",
        why="with fused permutation it calls Transformer Engine's kernel; joining slices does the same",
        wrap=_chunks_without_transformer_engine,
        fingerprints={"0.15.3": "6397db58a923", "0.16.1": "bec6ad436867"},
    ),
    Patch(
        name="moe-splits-as-numpy",
        target="megatron.core.transformer.moe.moe_utils:maybe_move_tensor_to_cpu",
        why="a tensor that is on the CPU already stays a tensor where numbers are asked for, and all_to_all refuses "
        "tensors as split sizes",
        wrap=_as_numpy_on_any_device,
        fingerprints={"0.15.3": "8e83a349dee8", "0.16.1": "47a1092f05ba"},
    ),
    Patch(
        name="moe-router-without-te",
        target="megatron.core.transformer.moe.moe_utils:router_gating_linear",
        why="megatron's router calls Transformer Engine's matrix product by a name that does not exist without it",
        wrap=_plain_product_without_transformer_engine,
        fingerprints={"0.15.3": "b563a51b967b", "0.16.1": "12d79f770ec7"},
    ),
)
