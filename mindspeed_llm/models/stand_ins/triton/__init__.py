"""Triton for a module that defines kernels whether or not they are ever run: they can be defined, and not run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mindspeed_llm.errors import UserError
from mindspeed_llm.models.stand_ins.triton import language

__all__ = ["cdiv", "jit", "language", "next_power_of_2"]


class _Kernel:
    """A kernel by name, indexed by a grid and called to run it."""

    def __init__(self, function: Callable[..., Any]):
        self.__name__ = function.__name__

    def __getitem__(self, grid: Any) -> _Kernel:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise UserError(
            f"triton: the kernel {self.__name__} cannot run, because triton is not installed; legal: options that need "
            "no such kernel; try: install triton on a machine with a GPU"
        )


def jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """The decorator, with options or without."""
    return _Kernel if function is None else _Kernel(function)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()
