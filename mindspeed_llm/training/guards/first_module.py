"""The first module whose output, or the gradient of whose output, is not finite, found by hooks while a batch runs.

Hooks read every value back from the device, so they are set only when something has gone wrong already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mindspeed_llm.parallel.shards import local_values, shard_of

LOSS = "the loss"


@dataclass(frozen=True)
class Finding:
    """Where values went wrong.

    Attributes:
        module: by its name in the whole model ("the loss" for what is computed outside of modules).
        what: "output", "gradient of the output", or "gradient of the weight" (or bias).
        bad, total: values that are not finite, of how many.
        chunk: number of the virtual stage on its rank.
    """

    module: str
    what: str
    bad: int
    total: int
    chunk: int

    def __str__(self) -> str:
        return f"{self.what} of {self.module}, {self.bad} of {self.total} values"


class _Watcher:
    """Collects the first finding."""

    def __init__(self) -> None:
        self.first: Finding | None = None

    def look(self, module: str, what: str, value: Tensor, chunk: int) -> None:
        """Note `value` if it is the first that is not finite."""
        if self.first is None and (bad := num_nonfinite(value)):
            self.first = Finding(module, what, bad, value.numel(), chunk)


def num_nonfinite(value: Tensor) -> int:
    """Values that are inf or nan."""
    return int((~torch.isfinite(value.detach())).sum()) if value.is_floating_point() else 0


@contextmanager
def watching(
    chunks: list[nn.Module], name_of: Callable[[int, str], str], gradients: bool
) -> Iterator[Callable[[], Finding | None]]:
    """Watch all modules of this rank while the body runs a batch.

    Args:
        name_of: (chunk number, local name) -> name in the whole model.
        gradients: look at gradients, in the order of the backward pass; False looks at outputs, in that of the forward.

    Yields:
        A function that returns the first finding since the last call.
    """
    watcher, handles = _Watcher(), []
    watched: set[Tensor] = set()

    def watch_weights(number: int, path: str, module: nn.Module, inputs: Any, output: Any) -> None:
        # Of a weight that is cut, what gets a gradient of this rank alone is the gathered one, which is there now.
        for local, parameter in module.named_parameters(path):
            if parameter.requires_grad and shard_of(parameter) is None and parameter not in watched:
                watched.add(parameter)
                handles.append(parameter.register_hook(_weight_hook(watcher, name_of(number, local), number)))

    for number, chunk in enumerate(chunks):
        for local, module in chunk.named_modules():
            name = name_of(number, local) if local else LOSS
            handles.append(module.register_forward_hook(_output_hook(watcher, name, number, gradients)))
            if gradients:
                # First of its hooks: another one lets the weights go.
                handles.append(module.register_forward_hook(partial(watch_weights, number, local), prepend=True))
    try:
        yield lambda: _take(watcher)
    finally:
        for handle in handles:
            handle.remove()


def _take(watcher: _Watcher) -> Finding | None:
    found, watcher.first = watcher.first, None
    return found


def _output_hook(watcher: _Watcher, name: str, chunk: int, gradients: bool) -> Callable[..., None]:
    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        for value in tensors_in(output):
            if not gradients:
                watcher.look(name, "output", value, chunk)
            elif value.requires_grad:
                value.register_hook(lambda grad: watcher.look(name, "gradient of the output", grad, chunk))

    return look


def _weight_hook(watcher: _Watcher, name: str, chunk: int) -> Callable[[Tensor], None]:
    """A weight's gradient may overflow where those of the activations do not."""
    module, _, weight = name.rpartition(".")
    return lambda grad: watcher.look(module, f"gradient of the {weight}", grad, chunk)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors of a module's output, however nested."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def nonfinite_weights(chunks: list[nn.Module], name_of: Callable[[int, str], str]) -> list[str]:
    """Parameters that hold values that are not finite: then no sample is to blame."""
    return [
        name_of(number, name)
        for number, chunk in enumerate(chunks)
        for name, parameter in chunk.named_parameters()
        if num_nonfinite(local_values(parameter))
    ]
