"""Named ranges in a profiler's trace; nothing at all where no profiler runs.

A name begins with what it names: `iteration 12`, `phase: forward`, `module: decoder.layers.0.mlp`,
`lora: adapter up`, `coc: product`. training/trace reads these names again.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import record_function

_UNNAMED = contextlib.nullcontext()
# A device's own profiler does not tell torch that it runs.
_running = False


def named(name: str, *values: Any) -> contextlib.AbstractContextManager:
    """A range of the trace around the body; small layers would feel one that nobody reads.

    Args:
        name: with {} for each of the values, which are put in where a profiler runs.
    """
    if _running or torch.autograd._profiler_enabled():
        return record_function(name.format(*values) if values else name)
    return _UNNAMED


def in_range(name: str) -> Callable[[Callable], Callable]:
    """Decorator: every call of the function is such a range."""

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*arguments: Any, **keywords: Any) -> Any:
            with named(name):
                return function(*arguments, **keywords)

        return call

    return decorate


def mark_running(running: bool) -> None:
    """Say that a profiler runs, or no longer."""
    global _running
    _running = running
