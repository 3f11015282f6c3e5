"""When a device has no memory left: what is known of where it went, and the cheapest changes that would have fitted."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from mindspeed_llm import accelerator
from mindspeed_llm.accelerator.out_of_memory import refused_bytes
from mindspeed_llm.checkpoint.space import in_units
from mindspeed_llm.errors import OutOfMemory
from mindspeed_llm.plan.fitting import cheapest
from mindspeed_llm.plan.memory import MemoryEstimate
from mindspeed_llm.plan.plan import Plan
from mindspeed_llm.plan.show import stages_memory
from mindspeed_llm.training.memory_report import TOGETHER, compared, measure, table
from mindspeed_llm.training.setup import TrainingModel


class OutOfMemoryAdvice:
    """Knows how much memory there was before training took any, and explains when it is gone.

    Attributes:
        model, optimizer: what exists so far, for the report.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._room = accelerator.current().memory_room()
        self.model: TrainingModel | None = None
        self.optimizer: Any = None

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Turn the device's refusal in the body into an error that says what to change.

        Raises:
            OutOfMemory: the device had no memory left; the report has been printed to stderr.
        """
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            asked = refused_bytes(error)
            if asked is None:
                raise
            try:
                explained = self._explained(asked)
            except Exception as wrong:  # the device's refusal is what counts
                explained = OutOfMemory(f"out of memory: {error}; what would have fitted is not known ({wrong!r})")
            raise explained from error

    def _explained(self, asked: int) -> OutOfMemory:
        rank = dist.get_rank()
        predicted = stages_memory(self._plan)[self._plan.layout.coordinates(rank).pp]
        taken = max(self._room - accelerator.current().memory_room(), 0)
        if self.model is not None:
            print(self._report(predicted), file=sys.stderr, flush=True)
        return explanation(self._plan, predicted, rank, room=self._room, taken=taken, asked=asked)

    def _report(self, predicted: MemoryEstimate) -> str:
        own = measure(self.model, self.optimizer, {}, accelerator.current().peak_memory_allocated() or None)
        # What activations and temporary tensors are of the rest was not watched.
        known = ["weights", "gradients", "optimizer", *[TOGETHER] * (own.peak is not None)]
        found = compared([predicted], [dataclasses.replace(own, stage=0)], known)
        rank = dist.get_rank()
        rows = {name: row | {"rank": None if row["rank"] is None else rank} for name, row in found.items()}
        return table(rows, f"memory of rank {rank} when there was no more, MiB")


def explanation(plan: Plan, predicted: MemoryEstimate, rank: int, *, room: int, taken: int, asked: int) -> OutOfMemory:
    """The error, in one line.

    Args:
        predicted: of this rank's stage.
        room: bytes that the device had for tensors before training took any.
        taken: of these when it refused.
        asked: bytes that it refused; 0 where nothing says how many.
    """
    # What the estimate lacks of what was needed, other programs and memory in pieces included, stays as it is.
    missing = max(taken + asked - predicted.total, 0)
    # What is swapped on a CPU lies in a file that is mapped, and takes as much of the process's addresses.
    without = ("swap_attention", "swap_optimizer") if accelerator.current().name == "cpu" else ()
    fitting = cheapest(plan, room - missing, without=without)
    parts = {
        "weights": predicted.weights,
        "gradients": predicted.gradients,
        "optimizer": predicted.optimizer,
        "activations": predicted.activations,
        "temporary": predicted.temporary,
    }
    sizes = ", ".join(f"{name} {in_units(size)}" for name, size in parts.items())
    more = f"{in_units(asked)} more" if asked else "more"
    if fitting:
        advice = "try: " + "; or ".join(change.line() for change in fitting)
    else:
        advice = "try: more devices, or a shorter --seq-length; no change of the other options alone would fit"
    return OutOfMemory(
        f"out of memory: rank {rank} asked for {more} when {in_units(taken)} of {in_units(room)} were taken, because "
        f"this training needs about {in_units(predicted.total)} there ({sizes}); {advice}"
    )
