"""Patches of megatron.core.transformer.experimental_attention_variant.dsa."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from mindspeed_llm.patching import Patch


def _first_of_equals(original: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    @functools.wraps(original)
    def forward_with_scores(self: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        # scores [b, s, s], chosen [b, s, k]
        scores, chosen = original(self, *args, **kwargs)
        if not scores.is_cuda:
            order = scores.sort(dim=-1, descending=True, stable=True).indices
            chosen = order[..., : chosen.shape[-1]].contiguous()
        return scores, chosen

    return forward_with_scores


PATCHES = (
    Patch(
        name="dsa-first-of-equals",
        target="megatron.core.transformer.experimental_attention_variant.dsa:DSAIndexer.forward_with_scores",
        why="among equal scores, as the -inf behind a causal mask, topk takes the first ones on CUDA and any on a CPU, "
        "so that the tokens a row has chosen would depend on the device",
        wrap=_first_of_equals,
        versions=">=0.16",
        fingerprints={"0.16.1": "78a0eb0b3046"},
    ),
)
