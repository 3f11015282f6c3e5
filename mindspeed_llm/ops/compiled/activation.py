"""Gated activations, SwiGLU among them, forward and backward one kernel each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mindspeed_llm.ops.activation import QUICK_GELU_SLOPE, TANH_CUBIC, TANH_SCALE, Gate, torch_gated_activation
from mindspeed_llm.ops.compiled import enter
from mindspeed_llm.ops.compiled.kernel import kernel
from mindspeed_llm.ops.swiglu import torch_swiglu

# In forms whose derivatives are finite everywhere; (1 + tanh u) / 2 is sigmoid(2 u), which takes less time.
FORMULAS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: x * torch.sigmoid(2 * TANH_SCALE * x * (1 + TANH_CUBIC * x * x)),
    "quick_gelu": lambda x: x * torch.sigmoid(QUICK_GELU_SLOPE * x),
    "relu": F.relu,
}


@enter("swiglu")
def compiled_swiglu(gate_up: Tensor) -> Tensor:
    """One pass each way; saves the input alone and computes silu(gate) again."""
    return _Gated.apply(gate_up, Gate("silu")) if _fits(gate_up) else torch_swiglu(gate_up)


@enter("gated_activation")
def compiled_gated_activation(gate_up: Tensor, gate: Gate) -> Tensor:
    """One pass each way; saves the input alone and computes the function again."""
    return _Gated.apply(gate_up, gate) if _fits(gate_up) else torch_gated_activation(gate_up, gate)


def _fits(gate_up: Tensor) -> bool:
    width = gate_up.shape[-1]
    return width > 2 and gate_up.numel() > width


def _value(gate: Tensor, up: Tensor, function: str, limit: float | None, linear_offset: float) -> Tensor:
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return FORMULAS[function](gate) * (up + linear_offset)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _forward(gate_up: Tensor, *, dim: int, function: str, limit: float | None, linear_offset: float) -> Tensor:
    gate, up = _wide(gate_up).unbind(dim)
    return _value(gate, up, function, limit, linear_offset).to(gate_up.dtype)


def _backward(
    grad: Tensor, gate_up: Tensor, *, dim: int, function: str, limit: float | None, linear_offset: float
) -> Tensor:
    gate, up = _wide(gate_up).unbind(dim)
    _, pull_back = torch.func.vjp(lambda *parts: _value(*parts, function, limit, linear_offset), gate, up)
    # Rounded before they are put together: otherwise they are put together in fp32, in memory of their own.
    return torch.stack([part.to(gate_up.dtype) for part in pull_back(_wide(grad))], dim)


# Gate and up are halves of a row, or neighbours in it.
FORWARD = {1: kernel("r 2 w")(_forward), 2: kernel("r w 2")(_forward)}
BACKWARD = {1: kernel("r w", "r 2 w")(_backward), 2: kernel("r w", "r w 2")(_backward)}


def _parted(gate_up: Tensor, interleaved: bool) -> tuple[Tensor, int]:
    """[rows, 2, f] or [rows, f, 2], contiguous, and where the two parts are."""
    width = gate_up.shape[-1] // 2
    sizes = (width, 2) if interleaved else (2, width)
    return gate_up.detach().reshape(-1, *sizes).contiguous(), 2 if interleaved else 1


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up: Tensor, gate: Gate) -> Tensor:
        ctx.gate = gate
        ctx.save_for_backward(gate_up)
        parts, dim = _parted(gate_up, gate.interleaved)
        constants = dict(function=gate.function, limit=gate.limit, linear_offset=gate.linear_offset)
        out = FORWARD[dim](parts, dim=dim, **constants)
        return out.view(*gate_up.shape[:-1], gate_up.shape[-1] // 2)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (gate_up,), gate = ctx.saved_tensors, ctx.gate
        parts, dim = _parted(gate_up, gate.interleaved)
        grads = grad.reshape(parts.shape[0], grad.shape[-1]).contiguous()
        constants = dict(function=gate.function, limit=gate.limit, linear_offset=gate.linear_offset)
        return BACKWARD[dim](grads, parts, dim=dim, **constants).view(gate_up.shape), None
