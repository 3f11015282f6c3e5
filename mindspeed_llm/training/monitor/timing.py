"""Where an iteration's time goes on this rank: its own work, waiting for other ranks, waiting for data.

A rank waits where its queue of work stands still inside a collective: in the collective itself when that runs in the
queue (NCCL, HCCL), in `Work.wait` otherwise (gloo, and collectives that overlap). Events before and after both give
that time on a CPU and on an accelerator alike.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch._C._distributed_c10d import ProcessGroup, Work

from mindspeed_llm import accelerator

COLLECTIVES = (
    "allreduce", "allreduce_coalesced", "reduce", "broadcast", "barrier", "send", "recv", "recv_anysource",
    "allgather", "_allgather_base", "all_gather_single", "allgather_into_tensor_coalesced", "gather", "scatter",
    "reduce_scatter", "_reduce_scatter_base", "reduce_scatter_single", "reduce_scatter_tensor_coalesced",
    "alltoall", "alltoall_base", "all_to_all_single", "_end_coalescing",
)  # fmt: skip


@dataclass(frozen=True)
class StepTime:
    """Seconds of one iteration (or their mean over several)."""

    step: float
    communication: float
    data: float

    @property
    def compute(self) -> float:
        """This rank's own work."""
        return max(self.step - self.communication - self.data, 0.0)


class StepClock:
    """Measures iterations between `begin` and `end`; the last `window` of them are kept."""

    def __init__(self, window: int) -> None:
        self._device = accelerator.current()
        self._steps: deque[tuple[Any, Any, Any, list]] = deque(maxlen=window)
        self._collectives: list[tuple[Any, Any]] = []
        self._begun: Any = None
        self._data: Any = None
        self._undo: list[tuple[type, str, Any]] = []

    def begin(self) -> None:
        """An iteration begins; from the first one on, collectives are timed."""
        if not self._undo:
            self._hook()
        self._collectives = []
        self._begun = self._mark()

    def end(self) -> None:
        """The iteration that has begun ends."""
        self._steps.append((self._begun, self._data, self._mark(), self._collectives))
        self._begun = None

    def have_data(self) -> None:
        """The batch of the iteration has been read, of which it has done nothing else so far."""
        self._data = self._mark()

    def mean(self, last: int) -> StepTime:
        """Over the last iterations, at most the window; waits until they are over.

        Raises:
            ValueError: there is no iteration.
        """
        self._device.synchronize()
        steps = [_times(*marks) for marks in list(self._steps)[-last:]]
        if not steps:
            raise ValueError("no iteration has ended yet")
        return StepTime(*(sum(values) / len(steps) for values in zip(*steps)))

    def close(self) -> None:
        """Leave torch's collectives as they were."""
        for owner, name, original in self._undo:
            setattr(owner, name, original)
        self._undo = []

    def _mark(self) -> Any:
        event = self._device.new_event(enable_timing=True)
        event.record()
        return event

    def _hook(self) -> None:
        names = [(ProcessGroup, name) for name in COLLECTIVES if name in vars(ProcessGroup)]
        for owner, name in [*names, (Work, "wait")]:
            original = vars(owner)[name]
            self._undo.append((owner, name, original))
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, collective: Callable) -> Callable:
        @functools.wraps(collective)
        def timed(*arguments: Any, **named: Any) -> Any:
            if self._begun is None:
                return collective(*arguments, **named)
            start = self._mark()
            try:
                return collective(*arguments, **named)
            finally:
                self._collectives.append((start, self._mark()))

        return timed


def _times(begun: Any, have_data: Any, ended: Any, collectives: list[tuple[Any, Any]]) -> tuple[float, float, float]:
    """(step, communication, data) in seconds."""
    waited = sum(start.elapsed_time(end) for start, end in collectives)
    return begun.elapsed_time(ended) / 1e3, waited / 1e3, begun.elapsed_time(have_data) / 1e3
