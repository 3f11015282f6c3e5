"""SwiGLU: silu(gate) * up, of the two halves of the last dimension. Source: arXiv 2002.05202."""

from __future__ import annotations

import torch
from torch import Tensor

from mindspeed_llm.ops.registry import REFERENCE, implementation, register
from mindspeed_llm.ops.row_blocks import row_blocks, scratch


def swiglu(gate_up: Tensor) -> Tensor:
    """[..., 2f] (gate first) -> [..., f]."""
    return implementation("swiglu")(gate_up)


@register("swiglu", "torch")
def torch_swiglu(gate_up: Tensor) -> Tensor:
    """torch's elementwise kernels; saves the input alone and recomputes silu(gate)."""
    if gate_up.numel() == gate_up.shape[-1]:
        # A token that is generated: nothing but the number of calls counts.
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up
    return _SwiGLU.apply(gate_up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gates, ups = _halves(gate_up)
        out = torch.empty(gates.shape, dtype=gates.dtype, device=gates.device)
        for block in row_blocks(*gates.shape, gates):
            torch.ops.aten.silu.out(gates[block], out=out[block]).mul_(ups[block])
        return out.view(*gate_up.shape[:-1], out.shape[1])

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gates, ups = _halves(gate_up)
        grads = grad.reshape(gates.shape)
        grad_gate_up = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
        grad_gates, grad_ups = _halves(grad_gate_up)
        blocks = list(row_blocks(*gates.shape, gates))
        products = scratch(blocks, gates.shape[1], gates)
        for block in blocks:
            gate, given = gates[block], grads[block]
            torch.ops.aten.silu.out(gate, out=grad_ups[block]).mul_(given)
            product = torch.mul(given, ups[block], out=products[: gate.shape[0]])
            torch.ops.aten.silu_backward.grad_input(product, gate, grad_input=grad_gates[block])
        return grad_gate_up


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """[..., 2f] -> two views [rows, f]."""
    return x.reshape(-1, x.shape[-1]).chunk(2, dim=-1)


@register("swiglu", REFERENCE, priority=-1)
def reference(gate_up: Tensor) -> Tensor:
    """The formula, differentiated by autograd."""
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up
