"""Which iteration this rank's weights and optimizer state are of, and what of it the next iteration changes early.

Weights and optimizer state change in one short stretch of an iteration. At any other time they are those of the last
finished one, and so are, in copies taken at its end, the small things that change earlier: random states, schedule,
loss scale, biases of routers. The random states go to the launcher's store (30 kB and 0.4 ms for an iteration), so that
those of a rank that was killed are known.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mindspeed_llm import accelerator
from mindspeed_llm.checkpoint.optimizer_state import grad_scaler_state
from mindspeed_llm.checkpoint.training_state import rng_key, rng_states
from mindspeed_llm.checkpoint.write_part import saved_bytes
from mindspeed_llm.training.hooks import LoopHook

if TYPE_CHECKING:
    from mindspeed_llm.training.loop import Progress, TrainingLoop
    from mindspeed_llm.training.step import BatchResult


@dataclass(frozen=True)
class Finished:
    """Small state after an iteration.

    Attributes:
        buffers: copies of the model's persistent buffers by the address of the live ones.
        device: that of the training thread.
        ready: event after which the device has computed the state.
        streams_of: iteration whose random states these are: the one before, if the batch was left out.
    """

    progress: Progress
    scheduler: dict[str, Any]
    grad_scaler: dict[str, Any] | None
    buffers: dict[int, torch.Tensor]
    device: torch.device
    ready: Any
    streams_of: int


class Standing(LoopHook):
    """Keeps `finished` true, and holds the training thread back once `freeze` was asked.

    Args:
        store: where random states go, any torch.distributed store.
    """

    def __init__(self, rank: int, store: Any) -> None:
        self.rank, self.store = rank, store
        self.finished: Finished | None = None
        self._coming = 0
        self._changing = threading.Lock()
        self._holds = False

    def before_batch(self, loop: TrainingLoop) -> None:
        """The first iteration, and any that does not follow the last one, stands on a state that was loaded."""
        if self.finished is None or self.finished.progress != loop.progress:
            self._share_streams(loop.progress.iteration)
            self._take(loop, loop.progress.iteration)
        self._coming = loop.progress.iteration + 1

    def flags(self) -> Mapping[str, float]:
        """Nothing; but the random states after the coming iteration are known from here on, and are told.

        Before the collective that ends the backward pass, so that no rank finishes an iteration of which another one,
        killed meanwhile, has not told them.
        """
        self._share_streams(self._coming)
        return {}

    def before_update(self, loop: TrainingLoop) -> None:
        """From here the state is of no iteration."""
        self._changing.acquire()  # never returns once the state is frozen
        self._holds = True

    def after_step(self, loop: TrainingLoop, result: BatchResult, grad_norm: float) -> None:
        """The state is of one iteration again."""
        streams_of = loop.progress.iteration
        if not self._holds:  # a batch that was left out, after which random states are those before it
            streams_of -= 1
            self._share_streams(loop.progress.iteration)
            self._changing.acquire()
        self._take(loop, streams_of)
        self._holds = False
        self._changing.release()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Another change of weights and optimizer state than an update; `before_batch` looks at what came of it."""
        with self._changing:
            yield
            self.finished = None

    def freeze(self, seconds: float) -> int | None:
        """Keep the finished iteration until the process ends.

        Returns:
            Its number; None before the first, and in the middle of an update that does not end in `seconds`.
        """
        if not self._changing.acquire(timeout=seconds) or self.finished is None:
            return None
        return self.finished.progress.iteration

    def _take(self, loop: TrainingLoop, streams_of: int) -> None:
        buffers = {b.data_ptr(): b.detach().clone() for chunk in loop.model.chunks for b in persistent_buffers(chunk)}
        progress, schedule = deepcopy(loop.progress), dict(loop.scheduler.state_dict())
        device = accelerator.current()
        ready = device.current_stream().record_event()
        scaler = grad_scaler_state(loop.optimizer)
        self.finished = Finished(progress, schedule, scaler, buffers, device.current_device(), ready, streams_of)

    def _share_streams(self, iteration: int) -> None:
        """Tell the random states after an iteration; ranks are at most one apart, so two are kept."""
        content = f"{iteration} {rng_key()}\n".encode() + saved_bytes([rng_states()])
        try:
            self.store.set(f"streams/{self.rank}/{iteration % 2}", content)
        except RuntimeError:
            pass  # the launcher has ended; while the ranks live, training goes on

    def streams_of(self, rank: int, iteration: int) -> dict[str, bytes]:
        """A rank's random states after an iteration as a checkpoint stores them: {key: object}, {} when not known."""
        key = f"streams/{rank}/{iteration % 2}"
        if not self.store.check([key]):
            return {}
        words, _, content = self.store.get(key).partition(b"\n")
        number, place = words.decode().split(" ")
        return {place: content} if int(number) == iteration else {}


def persistent_buffers(module: torch.nn.Module) -> list[torch.Tensor]:
    """Buffers that belong to the state of a module."""
    return [
        buffer
        for part in module.modules()
        for name, buffer in part.named_buffers(recurse=False)
        if name not in part._non_persistent_buffers_set
    ]
