"""SwiGLU: silu(gate) * up, of the two halves of the last dimension. Source: arXiv 2002.05202."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mindspeed_llm.ops.registry import REFERENCE, implementation, register


def swiglu(gate_up: Tensor) -> Tensor:
    """[..., 2f] (gate first) -> [..., f]."""
    return implementation("swiglu")(gate_up)


@register("swiglu", "torch")
def torch_swiglu(gate_up: Tensor) -> Tensor:
    """torch's elementwise kernels; saves the input alone and recomputes silu(gate)."""
    return _SwiGLU.apply(gate_up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        torch.mul(F.silu(gate), grad, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return grad_gate_up


@register("swiglu", REFERENCE, priority=-1)
def reference(gate_up: Tensor) -> Tensor:
    """The formula, differentiated by autograd."""
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up
