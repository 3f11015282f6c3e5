"""Memory-bound operators of a CPU as kernels that torch.compile makes: `--compile-operators`.

A chain of torch's functions reads and writes bf16 once for each of them; a compiled kernel reads its inputs and writes
its results once, and computes in fp32 between them. Sizes for which a kernel would be another one (a single row, a
single channel) go to the implementation that is chosen otherwise.
"""

from __future__ import annotations

from collections.abc import Callable

from mindspeed_llm import ops
from mindspeed_llm.accelerator import host_compiler
from mindspeed_llm.ops import registry

NAME = "compiled"


def enter(operator: str) -> Callable[[Callable], Callable]:
    """Decorator: enter a function as the compiled implementation of `operator`, which is used only when selected."""
    return registry.register(operator, NAME, devices=("cpu",), unless=host_compiler.why_not, priority=-1)


def operators() -> list[str]:
    """Names of the operators that have a compiled implementation."""
    ops.load_all()
    return [o for o in registry.operators() if any(e.name == NAME for e in registry.implementations(o))]
