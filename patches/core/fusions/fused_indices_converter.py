"""Patches of megatron.core.fusions.fused_indices_converter."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from mindspeed_llm.patching import Patch


def _without_triton(original: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    from megatron.core.fusions import fused_indices_converter

    if fused_indices_converter.HAVE_TRITON:
        return original

    @functools.wraps(original)
    def fused_indices_to_multihot(
        indices: Tensor, probs_indices: Tensor, num_of_local_experts: int
    ) -> tuple[Tensor, Tensor]:
        # [t, k] experts of each token, -1 for none -> [t, experts] whether and with which probability.
        place = torch.where(indices < 0, num_of_local_experts, indices).long()
        shape = (indices.shape[0], num_of_local_experts + 1)
        chosen = indices.new_zeros(shape, dtype=torch.bool).scatter(1, place, True)
        probs = probs_indices.new_zeros(shape).scatter(1, place, probs_indices)
        return chosen[:, :-1], probs[:, :-1]

    return fused_indices_to_multihot


PATCHES = (
    Patch(
        name="indices-to-multihot-without-triton",
        target="megatron.core.fusions.fused_indices_converter:fused_indices_to_multihot",
        why="it launches a Triton kernel; without triton that is a TypeError about a mock object",
        wrap=_without_triton,
        fingerprints={"0.15.3": "dd1691fbb8e6", "0.16.1": "3ce50ab509b1"},
    ),
)
