"""When a device has no memory left: what is known of where it went, and the cheapest changes that would have fitted."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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

# Ranks that have been told of a failure end within seconds; changes that take longer to find come too late.
SEARCH_SECONDS = 3.0
# Share of activations by which an estimate may be too low (tests/distributed/test_memory_report.py holds it to that).
UNSURE = 0.1


class OutOfMemoryAdvice:
    """Knows how much memory there was before training took any, and explains when it is gone.

    Args:
        tell: hears of the failure before changes are searched for, so that nobody waits for this rank meanwhile.
        saying: entered for the search, of which one plan can take longer than a rank that has failed is given.

    Attributes:
        model, optimizer: what exists so far, for the report.
    """

    def __init__(
        self,
        plan: Plan,
        tell: Callable[[BaseException], object] | None = None,
        saying: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self._plan, self._tell, self._saying = plan, tell, saying
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
                explained = self._explained(asked, error)
            except Exception as wrong:  # the device's refusal is what counts
                explained = OutOfMemory(f"out of memory: {error}; what would have fitted is not known ({wrong!r})")
            raise explained from error

    def _explained(self, asked: int, refusal: BaseException) -> OutOfMemory:
        rank = dist.get_rank()
        stage = self._plan.layout.coordinates(rank).pp
        predicted = stages_memory(self._plan)[stage]
        device = accelerator.current()
        left, lost = device.memory_room(), device.memory_in_pieces()
        if self.model is not None:
            print(self._report(predicted), file=sys.stderr, flush=True)
        places = self._plan.layout.layers
        layers = max(sum(len(places.layers(stage, chunk)) for chunk in range(places.vpp)), 1)
        shortage = Shortage(
            predicted, layers, rank, room=self._room, taken=max(self._room - left, 0), lost=lost, asked=asked
        )
        with self._saying():
            if self._tell is not None:
                told = OutOfMemory(f"out of memory: {shortage.words()}")
                told.__cause__ = refusal  # whose traceback stands in this rank's error file
                self._tell(told)
            return OutOfMemory(f"out of memory: {shortage.words()}; try: {advice(self._plan, shortage)}")

    def _report(self, predicted: MemoryEstimate) -> str:
        own = measure(self.model, self.optimizer, {}, accelerator.current().peak_memory_allocated() or None)
        # What activations and temporary tensors are of the rest was not watched.
        known = ["weights", "gradients", "optimizer", *[TOGETHER] * (own.peak is not None)]
        found = compared([predicted], [dataclasses.replace(own, stage=0)], known)
        rank = dist.get_rank()
        rows = {name: row | {"rank": None if row["rank"] is None else rank} for name, row in found.items()}
        return table(rows, f"memory of rank {rank} when there was no more, MiB")


@dataclasses.dataclass(frozen=True)
class Shortage:
    """What is known when a device has refused.

    Attributes:
        predicted: of this rank's stage, which has so many `layers`.
        room: bytes that the device had for tensors before training took any.
        taken: of these when it refused.
        lost: bytes of the others that were no help.
        asked: bytes that it refused; 0 where nothing says how many.
    """

    predicted: MemoryEstimate
    layers: int
    rank: int
    room: int
    taken: int
    lost: int
    asked: int

    @property
    def usable(self) -> int:
        """Bytes that another plan's estimate may come to: as much is lost, and missing in the estimate, as here."""
        missing = max(self.taken + self.asked - self.predicted.total, 0)
        # While the backward pass of a layer runs, gradients of what it saved are there too.
        unsure = (UNSURE + 1 / self.layers) * self.predicted.activations
        return int(self.room - self.lost - missing - unsure)

    def words(self) -> str:
        """One line, without what could be done."""
        parts = ("weights", "gradients", "optimizer", "activations", "temporary")
        sizes = ", ".join(f"{name} {in_units(getattr(self.predicted, name))}" for name in parts)
        more = f"{in_units(self.asked)} more" if self.asked else "more"
        return (
            f"rank {self.rank} asked for {more} when {in_units(self.taken)} of {in_units(self.room)} "
            f"were taken, because this training needs about {in_units(self.predicted.total)} there ({sizes})"
        )


def advice(plan: Plan, shortage: Shortage) -> str:
    """The cheapest changes that would have fitted, or that there are none."""
    # What is swapped on a CPU lies in a file that is mapped, and takes as much of the process's addresses.
    without = ("swap_attention", "swap_optimizer") if accelerator.current().name == "cpu" else ()
    found = cheapest(plan, shortage.usable, without=without, seconds=SEARCH_SECONDS)
    if found.fitting:
        return "; or ".join(change.line() for change in found.fitting)
    which = "no change of the other options alone would fit"
    if not found.complete:
        which = (
            f"none of {found.tried} changes of the other options that were planned in {SEARCH_SECONDS:g} s would fit"
        )
    return f"more devices, or a shorter --seq-length; {which}"
