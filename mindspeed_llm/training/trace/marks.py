"""The ranges that `--profile` puts into a trace: iterations, phases, and modules of the model."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import nn
from torch.profiler import record_function
from torch.utils.hooks import RemovableHandle

from mindspeed_llm.training.trace.names import BETWEEN, ITERATION, MODULE, PHASE, TIMERS


class _Timer:
    """What megatron-core's schedules start and stop around the passes of a micro-batch."""

    def __init__(self, name: str | None, marks: Marks) -> None:
        self._name, self._marks, self._range = name, marks, None

    def start(self, barrier: bool = False) -> None:
        """The pass begins; ranks are not brought together for it."""
        if self._name is not None and self._marks.in_batch:
            self._range = record_function(self._name)
            self._range.__enter__()

    def stop(self, barrier: bool = False) -> None:
        """The pass ends."""
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None


class Marks:
    """Ranges in the trace that runs; none before `open` and after `close`.

    Phases follow one another and lie in iterations. Inside a batch, megatron-core says through its timers when a pass
    begins and ends; evaluation between iterations uses the same timers and is not told apart.
    """

    def __init__(self) -> None:
        self._iteration: Any = None
        self._phase: Any = None
        self.in_batch = False
        self._hooks: list[RemovableHandle] = []
        self._configs: list[Any] = []
        self._timers: dict[str, _Timer] = {}

    def open(self, chunks: Iterable[nn.Module]) -> None:
        """Have the modules and schedules of a model say what they do."""
        for chunk in chunks:
            for name, module in chunk.named_modules():
                if name:
                    self._mark_module(name, module)
            config = getattr(chunk, "config", None)
            if config is not None:
                config.timers = self._timer
                self._configs.append(config)

    def iteration(self, number: int) -> None:
        """Iteration `number` begins."""
        self._leave()
        self._iteration = record_function(f"{ITERATION}{number}")
        self._iteration.__enter__()

    def phase(self, name: str) -> None:
        """A phase begins, which ends the one before."""
        self._leave_phase()
        self.in_batch = name != BETWEEN
        self._phase = record_function(PHASE + name)
        self._phase.__enter__()

    def close(self) -> None:
        """End all ranges, and leave the model as it was."""
        self._leave()
        for hook in self._hooks:
            hook.remove()
        for config in self._configs:
            config.timers = None
        self._hooks, self._configs = [], []

    def _leave(self) -> None:
        self._leave_phase()
        if self._iteration is not None:
            self._iteration.__exit__(None, None, None)
            self._iteration = None

    def _leave_phase(self) -> None:
        if self._phase is not None:
            self._phase.__exit__(None, None, None)
            self._phase = None

    def _mark_module(self, name: str, module: nn.Module) -> None:
        open_: list[record_function] = []
        self._hooks += [
            module.register_forward_pre_hook(partial(_enter, name=MODULE + name, open_=open_)),
            module.register_forward_hook(partial(_leave, open_=open_), always_call=True),
        ]

    def _timer(self, name: str, log_level: int = 0) -> _Timer:
        if name not in self._timers:
            phase = TIMERS.get(name)
            self._timers[name] = _Timer(None if phase is None else PHASE + phase, self)
        return self._timers[name]


def _enter(module: nn.Module, inputs: Any, name: str, open_: list) -> None:
    open_.append(record_function(name))
    open_[-1].__enter__()


def _leave(module: nn.Module, inputs: Any, output: Any, open_: list) -> None:
    if open_:
        open_.pop().__exit__(None, None, None)
