"""Patches of megatron.core.transformer.moe.moe_utils."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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


PATCHES = (
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
