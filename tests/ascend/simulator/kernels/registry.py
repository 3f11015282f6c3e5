"""The table of kernels, and what a device says when it refuses."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable
from typing import Any

KERNELS: dict[str, Callable[..., Any]] = {}
# How often each ran.
CALLS: collections.Counter[str] = collections.Counter()


def kernel(name: str) -> Callable[[Callable], Callable]:
    """Decorator: the function computes torch_npu's operator of that name, from CPU tensors."""

    def enter(function: Callable) -> Callable:
        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            CALLS[name] += 1
            return function(*args, **kwargs)

        KERNELS[name] = counted
        return function

    return enter


def require(condition: bool, operator: str, rule: str) -> None:
    """Refuse a call as a device does.

    Raises:
        RuntimeError: the condition does not hold.
    """
    if not condition:
        raise RuntimeError(f"{operator}: parameter error on the device: {rule}")
