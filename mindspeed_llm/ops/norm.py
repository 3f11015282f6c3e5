"""RMSNorm, x / sqrt(mean(x^2) + eps) * w, and LayerNorm, (x - mean) / sqrt(var + eps) * w + b, over the last dimension.

Statistics are accumulated in fp32 for bf16 and fp16, and the normalised value is rounded to x's dtype before the
weight multiplies it, as Llama and its relatives do. Source: arXiv 1910.07467.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mindspeed_llm.ops.registry import REFERENCE, implementation, register


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of x [..., h] with weight [h] of the same dtype; returns [..., h]."""
    return implementation("rms_norm")(x, weight, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm of x [..., h] with weight and bias [h]; returns [..., h]."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


@register("rms_norm", "torch", devices=("cuda",), priority=1)
def torch_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """torch's own, which is one fused kernel on CUDA."""
    return F.rms_norm(x, weight.shape, weight, eps)


@register("rms_norm", "two-pass")
def two_pass_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """A hand-written derivative that saves x and one number per row, where torch's composition saves fp32 copies."""
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(_accumulation_dtype(x.dtype))
        inverse_rms = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        out = (wide * inverse_rms).to(x.dtype).mul_(weight)
        ctx.save_for_backward(x, weight, inverse_rms)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        # With u = x * r: dL/dx = r * (g*w - u * mean(g*w*u)), dL/dw = sum over rows of g*u.
        x, weight, inverse_rms = ctx.saved_tensors
        unit = x.to(inverse_rms.dtype) * inverse_rms
        grad = grad.to(inverse_rms.dtype)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * unit).flatten(0, -2).sum(0).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None
        grad_unit = grad * weight
        projection = (grad_unit * unit).mean(-1, keepdim=True)
        return grad_unit.addcmul_(unit, projection, value=-1).mul_(inverse_rms).to(x.dtype), grad_weight, None


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@register("rms_norm", REFERENCE, priority=-1)
def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The formula, differentiated by autograd."""
    wide = x.to(_accumulation_dtype(x.dtype))
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight
