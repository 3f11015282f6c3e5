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


_aten = torch.ops.aten
_SQRT_HALF, TANH_SCALE, TANH_CUBIC = 0.5**0.5, (2 / torch.pi) ** 0.5, 0.044715


def _sigmoid_slope(argument: Tensor, value: Tensor, slope: Tensor, inner: Tensor | float) -> None:
    """value = x sigmoid(a(x)) and slope = s + value (1 - s) a'(x); `slope` holds s, `inner` is a'(x)."""
    torch.mul(argument, slope, out=value)
    slope.addcmul_(torch.rsub(slope, 1).mul_(inner), value)


def _silu(x: Tensor, value: Tensor, slope: Tensor | None) -> None:
    if slope is None:
        _aten.silu.out(x, out=value)
    else:
        _sigmoid_slope(x, value, torch.sigmoid(x, out=slope), 1.0)


def _quick_gelu(x: Tensor, value: Tensor, slope: Tensor | None) -> None:
    if slope is None:
        torch.mul(x, QUICK_GELU_SLOPE, out=value).sigmoid_().mul_(x)
    else:
        _sigmoid_slope(x, value, torch.mul(x, QUICK_GELU_SLOPE, out=slope).sigmoid_(), QUICK_GELU_SLOPE)


def _gelu_tanh(x: Tensor, value: Tensor, slope: Tensor | None) -> None:
    # (1 + tanh u) / 2 = sigmoid(2 u), which is the cheaper one, with 2 u = x (c + 0.044715 c x^2).
    scale = 2 * TANH_SCALE
    square = x.square()
    exponent = torch.mul(square, TANH_CUBIC * scale, out=value if slope is None else slope).add_(scale).mul_(x)
    if slope is None:
        exponent.sigmoid_().mul_(x)
    else:
        _sigmoid_slope(x, value, exponent.sigmoid_(), square.mul_(3 * TANH_CUBIC * scale).add_(scale))


def _gelu(x: Tensor, value: Tensor, slope: Tensor | None) -> None:
    _aten.gelu.out(x, out=value)
    if slope is not None:
        _aten.gelu_backward.grad_input(torch.ones_like(x), x, grad_input=slope)


def _relu(x: Tensor, value: Tensor, slope: Tensor | None) -> None:
    torch.clamp(x, min=0, out=value)
    if slope is not None:
        torch.gt(x, 0, out=slope)


# Name -> what writes the function's values and, where asked for, its derivatives.
FUNCTIONS: dict[str, Callable[[Tensor, Tensor, Tensor | None], None]] = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "relu": _relu,
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
    """torch's elementwise kernels in fp32, rounded once; saves the input alone and computes the function again."""
    return _Gated.apply(gate_up, gate)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up: Tensor, gate: Gate) -> Tensor:
        ctx.gate = gate
        ctx.save_for_backward(gate_up)
        rows = gate_up.reshape(-1, gate_up.shape[-1])
        out = torch.empty(rows.shape[0], rows.shape[1] // 2, dtype=rows.dtype, device=rows.device)
        wide = torch.promote_types(out.dtype, torch.float32)
        blocks = list(row_blocks(*out.shape, out, wide))
        values, widened = scratch(blocks, out.shape[1], out, wide), _widened(blocks, rows, wide)
        for block in blocks:
            argument, factor = _cut(_wide(rows[block], widened), gate)
            value = values[: argument.shape[0]]
            FUNCTIONS[gate.function](argument, value, None)
            torch.mul(value, factor, out=value)
            out[block] = value
        return out.view(*gate_up.shape[:-1], out.shape[1])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (gate_up,), gate = ctx.saved_tensors, ctx.gate
        rows = gate_up.reshape(-1, gate_up.shape[-1])
        grads = grad.reshape(rows.shape[0], rows.shape[1] // 2)
        result = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
        wide = torch.promote_types(grads.dtype, torch.float32)
        blocks = list(row_blocks(*grads.shape, grads, wide))
        values, slopes = (scratch(blocks, grads.shape[1], grads, wide) for _ in range(2))
        widened, widened_grads = (_widened(blocks, narrow, wide) for narrow in (rows, grads))
        for block in blocks:
            own, given = _wide(rows[block], widened), _wide(grads[block], widened_grads)
            argument, factor = _cut(own, gate)
            value, slope = values[: len(given)], slopes[: len(given)]
            FUNCTIONS[gate.function](argument, value, slope)
            grad_gate, grad_up = slope.mul_(given).mul_(factor), value.mul_(given)
            if gate.limit is not None:
                # As torch.clamp has it: a value at the limit still has a gradient.
                own_gate, own_up = _parts(own, gate.interleaved)
                grad_gate.masked_fill_(own_gate > gate.limit, 0)
                grad_up.masked_fill_(own_up.abs() > gate.limit, 0)
            to_gate, to_up = _parts(result[block], gate.interleaved)
            to_gate.copy_(grad_gate)
            to_up.copy_(grad_up)
        return result.view(gate_up.shape), None


def _widened(blocks: list[slice], rows: Tensor, wide: torch.dtype) -> Tensor | None:
    """Memory for the largest block in the wide type; None where that is the rows' own."""
    return None if rows.dtype == wide else scratch(blocks, rows.shape[1], rows, wide)


def _wide(block: Tensor, widened: Tensor | None) -> Tensor:
    return block if widened is None else widened[: block.shape[0]].copy_(block)


def _cut(gate_up: Tensor, gate: Gate) -> tuple[Tensor, Tensor]:
    """What the function is taken of, and what multiplies it."""
    argument, factor = _parts(gate_up, gate.interleaved)
    if gate.limit is not None:
        argument, factor = argument.clamp(max=gate.limit), factor.clamp(-gate.limit, gate.limit)
    return argument, factor + gate.linear_offset if gate.linear_offset else factor


# The formulas themselves, for the reference.
_FORMULAS = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x * _SQRT_HALF)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(TANH_SCALE * (x + TANH_CUBIC * x**3))),
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
