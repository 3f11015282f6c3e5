"""A chain of torch's operators as one C++ kernel of a CPU: torch.compile, once for each combination of types.

A kernel is compiled from an example of fixed sizes, not from the first tensors that arrive: what it computes then does
not depend on which these were, and nothing is compiled again when another number of rows comes. What is computed on
with stays in fp32 where the formula has bf16: values are rounded when they are stored. torch keeps the kernels on disk
(TORCHINDUCTOR_CACHE_DIR) and locks what two ranks would compile at once.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mindspeed_llm.accelerator import host_compiler
from mindspeed_llm.errors import UserError

# Sizes of an example: none equals or divides another, or is 0 or 1, which torch would take for fixed; large enough to
# be divided among threads.
EXAMPLE_SIZES = {"r": 521, "w": 1000}
OPTIONS = {
    # Rows are divided among the threads there are when it runs, not among those of the moment it was compiled.
    "cpp.dynamic_threads": True,
    # Kernels are few and small: processes that compile beside this one take longer to start than they save.
    "compile_threads": 1,
}


class Kernel:
    """A function of tensors, compiled for a CPU.

    Args:
        function: of tensors by position and of constants by name; it changes none of them.
        shapes: of each tensor by position, sizes apart by blanks: names of `EXAMPLE_SIZES` may differ between calls
            (from 2 on), other names are compiled in; "" is a scalar. None may be passed for a tensor.
    """

    def __init__(self, function: Callable[..., Any], shapes: tuple[str, ...]):
        self.function, self.shapes = function, tuple(shape.split() for shape in shapes)
        self._compiled: dict[tuple, Callable[..., Any]] = {}

    def __call__(self, *tensors: Tensor | None, **constants: Any) -> Any:
        """The function's results for contiguous tensors."""
        key = tuple(None if t is None else (t.dtype, *self._fixed(t, names)) for t, names in zip(tensors, self.shapes))
        key += tuple(constants.items())
        if key not in self._compiled:
            self._compiled[key] = self._compile(tensors, constants)
        with torch.no_grad():
            return self._compiled[key](*tensors)

    def _fixed(self, tensor: Tensor, names: list[str]) -> tuple[int, ...]:
        return tuple(size for size, name in zip(tensor.shape, names, strict=True) if name not in EXAMPLE_SIZES)

    def _compile(self, tensors: tuple[Tensor | None, ...], constants: dict[str, Any]) -> Callable[..., Any]:
        from torch._dynamo.exc import BackendCompilerFailed  # seconds of importing, which only who compiles shall pay

        # torch keeps what it compiled with a function's code, and so many versions of it: each has a code of its own.
        source = self.function
        code = source.__code__.replace()
        own = types.FunctionType(code, source.__globals__, source.__name__, source.__defaults__, source.__closure__)
        own.__kwdefaults__ = (source.__kwdefaults__ or {}) | constants
        compiled = torch.compile(own, dynamic=False, fullgraph=True, options=OPTIONS)
        examples = [None if t is None else self._example(t, names) for t, names in zip(tensors, self.shapes)]
        try:
            with torch.no_grad():
                compiled(*examples)
        except BackendCompilerFailed as error:
            lines = str(error).splitlines()
            said = next((line for line in lines if "error: " in line), lines[0])
            raise UserError(
                f"--compile-operators: {source.__name__} cannot be compiled by {host_compiler.compiler()}, because of "
                f"'{said.strip()}'; legal: a compiler with C++17 and OpenMP, named by CXX; try: --no-compile-operators"
            ) from error
        return compiled

    def _example(self, tensor: Tensor, names: list[str]) -> Tensor:
        sizes = [EXAMPLE_SIZES.get(name, size) for size, name in zip(tensor.shape, names, strict=True)]
        example = torch.zeros(sizes, dtype=tensor.dtype)
        for dim, name in enumerate(names):
            if name in EXAMPLE_SIZES:
                torch._dynamo.mark_dynamic(example, dim)
        return example


def kernel(*shapes: str) -> Callable[[Callable[..., Any]], Kernel]:
    """Decorator: the function as a `Kernel` of tensors of these shapes."""
    return lambda function: Kernel(function, shapes)
