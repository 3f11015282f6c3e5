"""Saving beside training: a copy of this rank's part in host memory, written by a thread.

Training waits for the copy alone. The copy's memory is taken once and used by every save; a save that begins while the
one before is still being written waits for it, so there is never a second copy. Until a save is complete, the
checkpoint before is the newest one, whatever happens.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
import torch.distributed as dist

from mindspeed_llm import accelerator
from mindspeed_llm.checkpoint.boxes import Box
from mindspeed_llm.checkpoint.train_save import SaveOrder, begin_save, write_and_complete
from mindspeed_llm.checkpoint.training_state import TrainingState
from mindspeed_llm.errors import UserError

_ALIGNMENT = 64


class StagingBuffer:
    """Host memory that holds one rank's boxes, page-locked where the device copies faster into such."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    @property
    def nbytes(self) -> int:
        """Bytes taken."""
        return self._memory.numel()

    def reserve(self, boxes: Iterable[Box]) -> None:
        """Take the memory that copies of these boxes need, if there is less, and touch all of it."""
        needed = sum(_padded(box.nbytes) for box in boxes)
        if needed > self.nbytes:
            self._memory = torch.empty(0, dtype=torch.uint8)  # never both at once
            pinned = accelerator.current().supports_pin_memory
            self._memory = torch.zeros(needed, dtype=torch.uint8, pin_memory=pinned)

    def copy(self, boxes: list[Box]) -> list[Box]:
        """The same boxes on copies of their values, which are there when this returns; valid until the next call."""
        self.reserve(boxes)
        copies, at = [], 0
        for box in boxes:
            own = self._memory[at : at + box.nbytes].view(box.tensor.dtype).view(box.shape)
            copies.append(replace(box, tensor=own.copy_(box.tensor, non_blocking=True)))
            at += _padded(box.nbytes)
        accelerator.current().synchronize()
        return copies


class AsyncSave:
    """Saves in the background, one at a time.

    Args:
        completed: called by the thread of the first rank for each complete checkpoint.
    """

    def __init__(self, completed: Callable[[SaveOrder], None] = lambda order: None) -> None:
        self._completed, self._buffer = completed, StagingBuffer()
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._given_up = False

    def reserve(self, state: TrainingState) -> None:
        """Take the memory for the copy before it is needed."""
        self._buffer.reserve(state.own_boxes())

    def start(self, order: SaveOrder, state: TrainingState) -> None:
        """Copy what this rank writes, and write it in the background; all ranks together.

        Raises:
            UserError: the save before this one failed.
        """
        self.wait()
        begin_save(order)
        copies = self._buffer.copy(state.own_boxes())
        self._thread = threading.Thread(target=self._write, args=(order, copies, state), name="save", daemon=True)
        self._thread.start()

    def is_busy(self) -> bool:
        """Whether a save is under way."""
        return self._thread is not None and self._thread.is_alive()

    def check(self) -> None:
        """Notice a failure of the background.

        Raises:
            UserError: the last save failed; said once.
        """
        failure, self._failure = self._failure, None
        if isinstance(failure, UserError):
            raise UserError(str(failure)) from failure
        if failure is not None:
            raise failure

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """Wait for the save that is under way.

        Returns:
            Whether none is under way any more.

        Raises:
            UserError: it failed.
        """
        if self._thread is not None:
            self._thread.join(timeout_seconds)
        self.check()
        return not self.is_busy()

    def give_up(self, seconds: float) -> None:
        """Let the save that is under way end within this time, or see to it that it will never be complete.

        For a run that has failed: ranks that it waits for may be gone, and another checkpoint comes next.
        """
        if self._thread is not None:
            self._thread.join(seconds)
        self._given_up = True

    def _write(self, order: SaveOrder, copies: list[Box], state: TrainingState) -> None:
        try:
            write_and_complete(order, copies, state, lambda: self._given_up)
            if dist.get_rank() == 0:
                self._completed(order)
        except Exception as wrong:  # whatever it is, the training thread raises it
            self._failure = wrong


def _padded(nbytes: int) -> int:
    return math.ceil(nbytes / _ALIGNMENT) * _ALIGNMENT
