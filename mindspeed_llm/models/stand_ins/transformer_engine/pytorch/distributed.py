"""Random streams and activation checkpointing under Transformer Engine's names: megatron's own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mindspeed_llm import accelerator

_states: dict[str, Tensor] = {}


def get_all_rng_states() -> dict[str, Tensor]:
    """The streams of the tracker, by name."""
    return _states


def is_fp8_activation_recompute_enabled() -> bool:
    """Whether scales are kept for a second forward pass: there are none."""
    return False


def activation_recompute_forward(activation_recompute: bool = False, recompute_phase: bool = False) -> Any:
    """A region whose activations are recomputed; it matters to scales of 8 bits alone."""
    return contextlib.nullcontext()


class CudaRNGStatesTracker:
    """Named random streams of the device; see megatron's class of the same name."""

    def __init__(self) -> None:
        self.states_: dict[str, Tensor] = {}
        self.seeds_: set[int] = set()

    def reset(self) -> None:
        """Forget all streams."""
        self.states_ = {}
        self.seeds_ = set()
        _states.clear()

    def get_states(self) -> dict[str, Tensor]:
        """A copy of the streams' states."""
        return {name: state.clone() for name, state in self.states_.items()}

    def set_states(self, states: dict[str, Tensor]) -> None:
        """Replace the streams' states."""
        self.states_ = dict(states)
        _states.update(states)

    def add(self, name: str, seed: int) -> None:
        """Begin a stream.

        Raises:
            Exception: the name or the seed is in use (Transformer Engine's and megatron's own type).
        """
        if seed in self.seeds_:
            raise Exception(f"seed {seed} already exists")
        if name in self.states_:
            raise Exception(f"state {name} already exists")
        self.seeds_.add(seed)
        generator = torch.Generator(accelerator.current().current_device())
        self.states_[name] = generator.manual_seed(seed).get_state()
        _states[name] = self.states_[name]

    @contextlib.contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        """Draw from a stream within the context.

        Raises:
            KeyError: there is none of that name.
        """
        if name not in self.states_:
            raise KeyError(f"state {name} does not exist")
        generator = accelerator.current().generator()
        outer = generator.get_state()
        generator.set_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = generator.get_state()
            _states[name] = self.states_[name]
            generator.set_state(outer)


def checkpoint(
    function: Callable[..., Any],
    *args: Any,
    distribute_saved_activations: bool = False,
    get_rng_state_tracker: Callable[[], Any] | None = None,
    tp_group: Any = None,
    **kwargs: Any,
) -> Any:
    """Run `function` without keeping its activations and again in the backward pass, drawing the same numbers."""
    from megatron.core.tensor_parallel.random import checkpoint as megatron_checkpoint

    def run(*tensors: Any) -> Any:
        return function(*tensors, **kwargs)

    return megatron_checkpoint(run, distribute_saved_activations, *args)
