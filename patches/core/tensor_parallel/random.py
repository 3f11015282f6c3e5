"""Patches of megatron.core.tensor_parallel.random."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from mindspeed_llm.patching import Patch


def _without_own_parameters(result: Any) -> Any:
    """The results of a recomputed function, each parameter among them as a view of itself."""
    if isinstance(result, tuple):
        return tuple(_without_own_parameters(item) for item in result)
    return result.view_as(result) if isinstance(result, torch.nn.Parameter) else result


def _leaves_parameters_leaves(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def checkpoint(function: Callable[..., Any], distribute_saved_activations: bool, *args: Any) -> Any:
        def without_own_parameters(*inputs: Any) -> Any:
            return _without_own_parameters(function(*inputs))

        return original(without_own_parameters, distribute_saved_activations, *args)

    return checkpoint


PATCHES = (
    Patch(
        name="recomputed-biases-stay-parameters",
        target="megatron.core.tensor_parallel.random:checkpoint",
        why="a recomputed MLP returns its bias beside its output, to be added later; autograd takes what a function "
        "returns for its result, so that the bias's gradient is that function's, which recomputes, and so on for ever",
        wrap=_leaves_parameters_leaves,
        fingerprints={"0.15.3": "7d8516d00a8f", "0.16.1": "7d8516d00a8f"},
    ),
)
