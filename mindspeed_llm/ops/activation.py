"""Gated activations: f(gate) * (up + linear_offset), gate and up being halves or neighbours of the last dimension.

With a limit c the gate is cut at c from above and up to [-c, c] before anything else, as gpt-oss does (f = quick_gelu,
linear_offset 1). SwiGLU without these is an operator of its own (`swiglu`), which has kernels everywhere.
Sources: arXiv 2002.05202; arXiv 1606.08415 for gelu and its approximations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mindspeed_llm.ops.registry import REFERENCE, implementation, register
from mindspeed_llm.ops.row_blocks import row_blocks, scratch
from mindspeed_llm.ops.swiglu import swiglu

# Sigmoid approximation of gelu: x sigmoid(1.702 x).
QUICK_GELU_SLOPE = 1.702


@dataclass(frozen=True)
class Gate:
    """What a gated activation computes.

    Args:
        function: one of `FUNCTIONS`.
        interleaved: gate and up are channels 0, 2, 4, ... and 1, 3, 5, ...; otherwise the two halves.
        limit: the gate is at most this and up at most this in absolute value; None for no limit.
        linear_offset: added to up.
    """

    function: str
    interleaved: bool = False
    limit: float | None = None
    linear_offset: float = 0.0

    def __post_init__(self):
        if self.function not in FUNCTIONS:
            raise ValueError(f"gate {self.function!r} is wrong; legal: {', '.join(FUNCTIONS)}")
        if self.limit is not None and self.limit <= 0:
            raise ValueError(f"limit {self.limit} is wrong, because the gate is cut there; legal: above 0")


def _quick_gelu(x: Tensor, out: Tensor) -> Tensor:
    return torch.mul(x, QUICK_GELU_SLOPE, out=out).sigmoid_().mul_(x)


def _quick_gelu_backward(grad: Tensor, x: Tensor, out: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(QUICK_GELU_SLOPE * x)
    return torch.mul(grad * sigmoid, 1 + QUICK_GELU_SLOPE * x * (1 - sigmoid), out=out)


_aten = torch.ops.aten

# Name -> (function, its derivative from (gradient, argument)), each with where to write.
FUNCTIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "silu": (
        lambda x, out: _aten.silu.out(x, out=out),
        lambda grad, x, out: _aten.silu_backward.grad_input(grad, x, grad_input=out),
    ),
    "gelu": (
        lambda x, out: _aten.gelu.out(x, out=out),
        lambda grad, x, out: _aten.gelu_backward.grad_input(grad, x, grad_input=out),
    ),
    "gelu_tanh": (
        lambda x, out: _aten.gelu.out(x, approximate="tanh", out=out),
        lambda grad, x, out: _aten.gelu_backward.grad_input(grad, x, approximate="tanh", grad_input=out),
    ),
    "quick_gelu": (_quick_gelu, _quick_gelu_backward),
    "relu": (
        lambda x, out: torch.clamp(x, min=0, out=out),
        lambda grad, x, out: _aten.threshold_backward.grad_input(grad, x, 0, grad_input=out),
    ),
}


def gated_activation(gate_up: Tensor, gate: Gate) -> Tensor:
    """[..., 2f] -> [..., f]."""
    if gate == Gate("silu"):
        return swiglu(gate_up)
    return implementation("gated_activation")(gate_up, gate)


def _parts(gate_up: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Views of gate and up."""
    if interleaved:
        return gate_up[..., 0::2], gate_up[..., 1::2]
    return gate_up.chunk(2, dim=-1)


@register("gated_activation", "torch")
def torch_gated_activation(gate_up: Tensor, gate: Gate) -> Tensor:
    """torch's elementwise kernels; saves the input alone and computes the function again in backward."""
    return _Gated.apply(gate_up, gate)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up: Tensor, gate: Gate) -> Tensor:
        ctx.gate = gate
        ctx.save_for_backward(gate_up)
        function, _ = FUNCTIONS[gate.function]
        rows = gate_up.reshape(-1, gate_up.shape[-1])
        out = torch.empty(rows.shape[0], rows.shape[1] // 2, dtype=rows.dtype, device=rows.device)
        for block in row_blocks(*out.shape, out):
            argument, factor = _Gated.cut(rows[block], gate)
            function(argument, out[block]).mul_(factor)
        return out.view(*gate_up.shape[:-1], out.shape[1])

    @staticmethod
    def cut(gate_up: Tensor, gate: Gate) -> tuple[Tensor, Tensor]:
        """What the function is taken of, and what multiplies it."""
        argument, factor = _parts(gate_up, gate.interleaved)
        if gate.limit is not None:
            argument, factor = argument.clamp(max=gate.limit), factor.clamp(-gate.limit, gate.limit)
        return argument, factor + gate.linear_offset if gate.linear_offset else factor

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (gate_up,), gate = ctx.saved_tensors, ctx.gate
        rows = gate_up.reshape(-1, gate_up.shape[-1])
        grads = grad.reshape(rows.shape[0], rows.shape[1] // 2)
        result = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
        blocks = list(row_blocks(*grads.shape, grads))
        products = scratch(blocks, grads.shape[1], grads)
        for block in blocks:
            given = grads[block]
            _Gated.gradient(rows[block], given, gate, result.view(rows.shape)[block], products[: given.shape[0]])
        return result, None

    @staticmethod
    def gradient(gate_up: Tensor, grad: Tensor, gate: Gate, out: Tensor, product: Tensor) -> None:
        """Write the gradient of some rows to `out`; `product` is room for as many numbers as `grad` has."""
        function, derivative = FUNCTIONS[gate.function]
        argument, factor = _Gated.cut(gate_up, gate)
        grad_gate, grad_up = _parts(out, gate.interleaved)
        function(argument, grad_up).mul_(grad)
        derivative(torch.mul(grad, factor, out=product), argument, grad_gate)
        if gate.limit is not None:
            # As torch.clamp has it: a value at the limit still has a gradient.
            own_gate, own_up = _parts(gate_up, gate.interleaved)
            grad_gate.masked_fill_(own_gate > gate.limit, 0)
            grad_up.masked_fill_(own_up.abs() > gate.limit, 0)


_SQRT_HALF, _TANH_SCALE = 0.5**0.5, (2 / torch.pi) ** 0.5

# The formulas themselves, for the reference.
_FORMULAS = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x * _SQRT_HALF)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(_TANH_SCALE * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + torch.exp(-QUICK_GELU_SLOPE * x)),
    "relu": lambda x: x.clamp(min=0),
}


@register("gated_activation", REFERENCE, priority=-1)
def reference(gate_up: Tensor, gate: Gate) -> Tensor:
    """The formula, differentiated by autograd."""
    argument, factor = _parts(gate_up, gate.interleaved)
    if gate.limit is not None:
        argument, factor = argument.clamp(max=gate.limit), factor.clamp(-gate.limit, gate.limit)
    return _FORMULAS[gate.function](argument) * (factor + gate.linear_offset)
