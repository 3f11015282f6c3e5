"""Patches of megatron.core.fusions.fused_pad_routing_map."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor

from mindspeed_llm.patching import Patch


def _without_triton(original: Callable[[Tensor, int], Tensor]) -> Callable[[Tensor, int], Tensor]:
    from megatron.core.fusions import fused_pad_routing_map as module

    if module.HAVE_TRITON:
        return original

    @functools.wraps(original)
    def fused_pad_routing_map(routing_map: Tensor, pad_multiple: int) -> Tensor:
        # Each expert (column) gets its first tokens that are not its own, up to a multiple.
        chosen = routing_map.int()
        missing = (-chosen.sum(0)) % pad_multiple
        free = chosen == 0
        return chosen + (free & (free.int().cumsum(0) <= missing)).int()

    return fused_pad_routing_map


PATCHES = (
    Patch(
        name="pad-routing-map-without-triton",
        target="megatron.core.fusions.fused_pad_routing_map:fused_pad_routing_map",
        why="it launches a Triton kernel; without triton that is a TypeError about a mock object",
        wrap=_without_triton,
        fingerprints={"0.15.3": "15060b2c09c2", "0.16.1": "b87109e127ff"},
    ),
)
