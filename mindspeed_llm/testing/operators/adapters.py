"""Cases of products with a low-rank adapter, with and without dropout by counter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mindspeed_llm.ops.adapter import CounterMask
from mindspeed_llm.testing.operators import Case, Draw

# Operator -> every implementation that may be registered for it.
IMPLEMENTATIONS = {
    operator: ("reference", "torch", "triton")
    for operator in ("adapter_down", "adapter_down_gradient", "adapter_up", "adapted_product")
}


def mask(probability: float) -> CounterMask | None:
    """A mask whose seed has bits in both of its words."""
    return CounterMask(probability, torch.tensor([(1 << 61) + 12345])) if probability else None


def sizes(
    operator: str, m: int, k: int, n: int, r: int, dropout: float, bias: bool = False
) -> Callable[[Draw], tuple[Any, ...]]:
    """Inputs of an operator for two sequences of m rows, widths k and n, and rank r."""

    def inputs(draw: Draw) -> tuple[Any, ...]:
        if operator == "adapter_down":
            return draw(m, 2, k), draw(r, k), mask(dropout)
        if operator == "adapter_down_gradient":
            return draw(m, 2, r), draw(m, 2, k), mask(dropout)
        if operator == "adapter_up":
            return draw(m, 2, n), draw(m, 2, r), draw(n, r), 0.5, mask(dropout)
        # Both factors as the backward pass has them, transposed views, where there is no bias.
        weight, b = (draw(n, k), draw(n, r)) if bias else (draw(k, n).t(), draw(r, n).t())
        return draw(m, 2, k), weight, draw(n) if bias else None, draw(m, 2, r), b, 0.5, mask(dropout)

    return inputs


def call(function: Callable[..., Any], *inputs: Any) -> Any:
    """Nothing is differentiated, and what is written to is a copy."""
    with torch.no_grad():
        return function(*(i.detach().clone() if isinstance(i, Tensor) and n == 0 else i for n, i in enumerate(inputs)))


# Name, sizes, dropout, bias.
CALLS = (
    ("plain", (3, 8, 6, 2), 0.0, True),
    ("dropout", (5, 12, 9, 4), 0.3, False),
    ("one token", (1, 16, 8, 4), 0.0, False),
    ("rows of uneven width", (3, 13, 11, 5), 0.1, True),
)

CASES = [
    Case(operator, name, sizes(operator, *numbers, dropout, bias), call, differentiable=False)
    for operator in IMPLEMENTATIONS
    for name, numbers, dropout, bias in CALLS
]
