"""Points of an iteration at which others act: the loop calls them in order, on every rank."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mindspeed_llm.training.loop import TrainingLoop
    from mindspeed_llm.training.step import BatchResult


class Wish(enum.Flag):
    """What the end of an iteration asks of the loop; wishes of several hooks add up, alike on all ranks."""

    NOTHING = 0
    SAVE = enum.auto()
    LEAVE = enum.auto()


class LoopHook:
    """What happens beside training; a subclass overrides the points it needs.

    One iteration calls `before_batch`, reads the batch, calls `after_data`, runs forward and backward, sums `flags`
    over all ranks with the loss, calls `after_backward`, `before_update` (unless the batch is left out), `after_step`,
    `figures` if a log line is due, and `end_of_iteration`.
    Between `before_update` and `after_step` weights and optimizer state are not those of one iteration.
    """

    def flags(self) -> Mapping[str, float]:
        """What this rank tells the others: numbers, summed over all ranks into `BatchResult.flags`.

        The names must be the same on every rank and in every iteration. Read when the backward pass has ended.
        """
        return {}

    def before_batch(self, loop: TrainingLoop) -> None:
        """Nothing of the iteration has happened; `loop.progress` is that of the iteration before."""

    def after_data(self, loop: TrainingLoop) -> None:
        """The batch has been read; forward and backward are next."""

    def after_backward(self, loop: TrainingLoop, result: BatchResult) -> None:
        """Loss and gradients (reduced) are known, nothing is updated."""

    def before_update(self, loop: TrainingLoop) -> None:
        """The gradient norm is known and good; weights and optimizer state change next, with no check in between."""

    def after_step(self, loop: TrainingLoop, result: BatchResult, grad_norm: float) -> None:
        """Weights, optimizer, schedule and `loop.progress` are those of the finished iteration."""

    def figures(self, loop: TrainingLoop) -> Mapping[str, float]:
        """What the log line at hand adds to its sinks, by name; called on every rank, the last one's is written."""
        return {}

    def end_of_iteration(self, loop: TrainingLoop) -> Wish:
        """After log line and evaluation: whether to save or leave. Must agree on all ranks (see `flags`)."""
        return Wish.NOTHING


def collect_flags(hooks: Iterable[LoopHook]) -> dict[str, float]:
    """The flags of all hooks; names are distinct."""
    found: dict[str, float] = {}
    for hook in hooks:
        own = hook.flags()
        assert not found.keys() & own.keys(), f"two hooks use the flag {found.keys() & own.keys()}"
        found |= own
    return found
