"""RMSNorm of bf16 and fp16, by itself and of a sum, forward and backward one kernel each.

In fp32 the composition over blocks of rows is as fast (docs/benchmarks.md), and is used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mindspeed_llm.ops.compiled import enter
from mindspeed_llm.ops.compiled.kernel import kernel
from mindspeed_llm.ops.norm import plain_weight, two_pass_add_rms_norm, two_pass_rms_norm

NARROW = (torch.bfloat16, torch.float16)


@enter("rms_norm")
def compiled_rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """One pass each way; saves x and one number per row."""
    if not _fits(x):
        return two_pass_rms_norm(x, weight, eps, offset)
    return _RMSNorm.apply(x, weight, eps, offset)


@enter("add_rms_norm")
def compiled_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """One pass each way; saves the sum and one number per row."""
    if not _fits(x) or x.dtype != residual.dtype:
        return two_pass_add_rms_norm(x, residual, weight, eps, offset)
    return _AddRMSNorm.apply(x, residual, weight, eps, offset)


def _fits(x: Tensor) -> bool:
    width = x.shape[-1]
    return x.dtype in NARROW and width > 1 and x.numel() > width


@kernel("r w", "w", "")
def normalize(x: Tensor, factor: Tensor, eps: Tensor, *, plain: bool) -> tuple[Tensor, Tensor]:
    """The norm, and 1 / rms, [r, 1]; a plain factor multiplies in x's type, as far as a kernel has that."""
    wide = x.float()
    inverse_rms = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    unit = wide * inverse_rms
    return (unit.to(x.dtype) * factor if plain else (unit * factor).to(x.dtype)), inverse_rms


@kernel("r w", "r w", "w", "")
def add_normalize(x: Tensor, residual: Tensor, factor: Tensor, eps: Tensor, *, plain: bool) -> tuple[Tensor, ...]:
    """As `normalize`, of the sum before a kernel rounds it, and the sum."""
    total = x + residual
    return *normalize.function(total, factor, eps, plain=plain), total


@kernel("r w", "r w", "w", "r 1", "r w")
def gradients(
    grad: Tensor, x: Tensor, factor: Tensor, inverse_rms: Tensor, beside: Tensor | None, *, needs_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x, with `beside` added before it is rounded, and of the factor, fp32."""
    given, wide, factor = grad.float(), x.float(), factor.float()
    both = given * wide
    projection = (both * factor).mean(-1, keepdim=True) * inverse_rms.square()
    grad_x = (given * factor - wide * projection) * inverse_rms
    if beside is not None:
        grad_x = grad_x + beside
    return grad_x.to(x.dtype), (both * inverse_rms).sum(0) if needs_weight else None


def _rows(x: Tensor) -> Tensor:
    """[..., h] -> [rows, h], contiguous."""
    return x.detach().reshape(-1, x.shape[-1]).contiguous()


def _prepared(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor, bool]:
    """What multiplies, epsilon, and whether the factor is plain."""
    plain = plain_weight(x, weight, offset)
    factor = weight.detach() if plain else weight.detach().float() + offset
    return factor, torch.full((), eps, dtype=torch.float32), plain


def _gradients(ctx, grad: Tensor, beside: Tensor | None, needs_weight: bool) -> tuple[Tensor, Tensor | None]:
    x, weight, inverse_rms = ctx.saved_tensors
    factor = weight.detach() + ctx.offset if ctx.offset else weight.detach()
    beside = None if beside is None else _rows(beside)
    grad_x, grad_weight = gradients(_rows(grad), _rows(x), factor, inverse_rms, beside, needs_weight=needs_weight)
    return grad_x.view(x.shape), None if grad_weight is None else grad_weight.to(weight.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        factor, smallest, plain = _prepared(x, weight, eps, offset)
        out, inverse_rms = normalize(_rows(x), factor, smallest, plain=plain)
        ctx.offset = offset
        ctx.save_for_backward(x, weight, inverse_rms)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, grad, None, ctx.needs_input_grad[1]), None, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
        factor, smallest, plain = _prepared(x, weight, eps, offset)
        out, inverse_rms, total = add_normalize(_rows(x), _rows(residual), factor, smallest, plain=plain)
        total = total.view(x.shape)
        ctx.offset = offset
        ctx.save_for_backward(total, weight, inverse_rms)
        return out.view(x.shape), total

    @staticmethod
    def backward(ctx, grad: Tensor, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        grad_sum, grad_weight = _gradients(ctx, grad, grad_total, ctx.needs_input_grad[2])
        return grad_sum, grad_sum, grad_weight, None, None
