"""Cases on which every implementation of an operator is compared with its reference, forward and backward.

A table of cases (`elementwise`, `attention_and_experts`) names its operators with all their implementations in
`IMPLEMENTATIONS` and lists `CASES`. tests/unit/ops/test_operators.py runs them on the CPU; one that is missing from the
tables fails there.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mindspeed_llm.ops import registry


class Draw:
    """Random inputs of one case: the same for every implementation, in fp64 and then rounded to `dtype`."""

    def __init__(self, seed: int, dtype: torch.dtype):
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normally distributed, a leaf that needs a gradient."""
        return self.made(torch.randn(*shape, generator=self.generator, dtype=torch.float64), dtype)

    def made(self, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A leaf of these values that needs a gradient; its strides are kept."""
        return values.to(dtype or self.dtype).requires_grad_()

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Uniform in [low, high)."""
        return torch.randint(low, high, shape, generator=self.generator)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of an operator.

    Args:
        operator: its name in the registry.
        name: what is special about this call.
        inputs: positional arguments, from a `Draw`; floating-point tensors that need a gradient are differentiated.
        call: how a function is called with them and what it returns, where it is not `function(*inputs)`.
        differentiable: whether gradients are compared.
        tolerance: of fp64, relative and absolute.
        half: largest error in bf16 over the largest value, against fp64 on the same inputs; None where the operator
            does not take bf16.
    """

    operator: str
    name: str
    inputs: Callable[[Draw], tuple[Any, ...]]
    call: Callable[..., Any] = lambda function, *inputs: function(*inputs)
    differentiable: bool = True
    tolerance: float = 1e-10
    half: float | None = 2**-6

    def __str__(self) -> str:
        return f"{self.operator}: {self.name}"


def runnable(operator: str) -> list[registry.Implementation]:
    """Every implementation but the reference that computes on a CPU here, including torch's for other devices."""
    return [
        entry
        for entry in registry.implementations(operator)
        if entry.name != registry.REFERENCE
        and (entry.missing("cpu") is None or (not entry.requires and "npu" not in entry.devices))
    ]


def evaluate(case: Case, function: Callable[..., Any], dtype: torch.dtype) -> list[Tensor]:
    """Outputs of `function` on the case's inputs, then gradients of all inputs for one random direction."""
    seed = zlib.crc32(str(case).encode())
    inputs = case.inputs(Draw(seed, dtype))
    outputs = case.call(function, *inputs)
    outputs = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
    if not case.differentiable:
        return outputs
    leaves = [i for i in inputs if isinstance(i, Tensor) and i.requires_grad]
    generator = torch.Generator().manual_seed(seed + 1)
    directions = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs]
    gradients = torch.autograd.grad(outputs, leaves, directions)
    for leaf, gradient in zip(leaves, gradients):
        assert gradient.dtype == leaf.dtype and gradient.shape == leaf.shape, "a gradient looks like its input"
    return [o.detach() for o in outputs] + list(gradients)


def check(case: Case, function: Callable[..., Any]) -> None:
    """Compare with the reference in fp64, and in bf16 where the case says so.

    Raises:
        AssertionError: they differ by more than the tolerance, in value, dtype or shape.
    """
    reference = next(e for e in registry.implementations(case.operator) if e.name == registry.REFERENCE).function
    expected = evaluate(case, reference, torch.float64)
    for one, other in zip(evaluate(case, function, torch.float64), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=case.tolerance, atol=case.tolerance)
    if case.half is None:
        return
    seen = evaluate(case, function, torch.bfloat16)
    rounded = evaluate(case, _on_doubles(reference), torch.bfloat16)
    plain = evaluate(case, reference, torch.bfloat16)
    for one, exact, other in zip(seen, rounded, plain, strict=True):
        assert one.dtype == other.dtype, f"{one.dtype} where the reference has {other.dtype}"
        if exact.numel():
            error = float((one.double() - exact.double()).abs().max())
            assert error <= case.half * max(float(exact.abs().max()), 1e-30), f"bf16 is off by {error}"


def _on_doubles(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function computed in fp64 on the values of narrower inputs."""

    def wide(*inputs: Any) -> Any:
        return function(*(i.double() if isinstance(i, Tensor) and i.is_floating_point() else i for i in inputs))

    return wide
