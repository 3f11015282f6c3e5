"""Requests to stop: signals by which schedulers, launchers and people end a run that is to be continued.

The handler only takes a note. All ranks learn of it with the loss of the running iteration, save together and leave
with status 0, which a launcher takes for a finished run and does not start again.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from mindspeed_llm.parallel import watch
from mindspeed_llm.training.hooks import LoopHook, Wish

if TYPE_CHECKING:
    from mindspeed_llm.training.loop import TrainingLoop
    from mindspeed_llm.training.step import BatchResult

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# A scheduler signals launcher and ranks, and the launcher hands its signal on: within this time they are one request.
SAME_REQUEST_SECONDS = 3.0


class StopRequest(LoopHook):
    """Whether somebody asked this rank, or any other, to stop.

    Attributes:
        signal_name: of the first signal that came here, None while none did.
        asked: ranks that were asked, known to all of them at the end of an iteration.
        reason: what the run says it stopped for, once it does.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self.asked = 0
        self.reason: str | None = None
        self._first_at = 0.0

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Take the signals while the body runs; only a process's main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._take) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                # What was not set from Python reads as None and cannot be set from Python.
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _take(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal_name is None:
            self.signal_name, self._first_at = signal.Signals(number).name, now
            watch.suspect()
        elif now - self._first_at > SAME_REQUEST_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def flags(self) -> Mapping[str, float]:
        """1 where a signal came."""
        return {"stop": float(self.signal_name is not None)}

    def after_backward(self, loop: TrainingLoop, result: BatchResult) -> None:
        """Learn how many ranks were asked."""
        self.asked = int(result.flags["stop"])

    def end_of_iteration(self, loop: TrainingLoop) -> Wish:
        """Leave (which saves) when any rank was asked."""
        if not self.asked:
            return Wish.NOTHING
        self.reason = self.signal_name or f"a signal to {self.asked} other rank{'s' * (self.asked > 1)}"
        return Wish.LEAVE
