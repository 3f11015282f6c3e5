"""RMSNorm, x / sqrt(mean(x^2) + eps) * w, and LayerNorm, (x - mean) / sqrt(var + eps) * w + b, over the last dimension.

Statistics are accumulated in fp32 for bf16 and fp16. A weight of x's dtype multiplies the normalised value after that
is rounded, as Llama and its relatives do; an fp32 weight, or one kept as its difference from 1 (`offset`, Gemma),
multiplies it in fp32 and the product is rounded once. Sources: arXiv 1910.07467, arXiv 1607.06450.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mindspeed_llm.ops.registry import REFERENCE, implementation, register
from mindspeed_llm.ops.row_blocks import row_blocks, scratch


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """RMSNorm of x [..., h] with weight [h], of x's dtype or wider; returns [..., h] of x's dtype.

    Args:
        offset: added to the weight; 1 where a weight is stored as its difference from 1.
    """
    return implementation("rms_norm")(x, weight, eps, offset)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """RMSNorm of the sum of x and residual [..., h], and the sum itself, rounded to its dtype before it is normalised.

    Returns:
        normed [..., h], sum [..., h].
    """
    return implementation("add_rms_norm")(x, residual, weight, eps, offset)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """LayerNorm of x [..., h] with weight and bias [h], of x's dtype or wider; returns [..., h] of x's dtype."""
    return implementation("layer_norm")(x, weight, bias, eps, offset)


def plain_weight(x: Tensor, weight: Tensor, offset: float) -> bool:
    """Whether the weight multiplies in x's dtype: what kernels that know neither fp32 weights nor offsets compute."""
    return weight.dtype == x.dtype and offset == 0.0


@register("rms_norm", "torch", devices=("cuda",), priority=2)
def torch_rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """torch's own, which is one fused kernel on CUDA; it multiplies the weight before rounding."""
    if not plain_weight(x, weight, offset):
        return two_pass_rms_norm(x, weight, eps, offset)
    return F.rms_norm(x, weight.shape, weight, eps)


@register("rms_norm", "two-pass")
def two_pass_rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """A hand-written derivative that saves x and one number per row, where torch's composition saves fp32 copies."""
    if x.numel() == x.shape[-1]:
        # A token that is generated: nothing but the number of calls counts.
        return rms_norm_reference(x, weight, eps, offset)
    return _RMSNorm.apply(x, weight, eps, offset)


@register("add_rms_norm", "composed", devices=("cuda", "npu"), priority=1)
def composed_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The sum, then the device's kernel of the norm."""
    total = x + residual
    return rms_norm(total, weight, eps, offset), total


@register("add_rms_norm", "two-pass")
def two_pass_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The two-pass norm of the sum; the gradient of the sum is added to in place."""
    return _AddRMSNorm.apply(x, residual, weight, eps, offset)


def _normalize(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """RMSNorm of x and its 1 / rms, wide, [rows, 1]."""
    rows, wide = _rows(x), _wide(x.dtype)
    out, inverse_rms = torch.empty_like(rows), rows.new_empty(rows.shape[0], 1, dtype=wide)
    smallest = torch.full((), eps, dtype=wide, device=x.device)
    factor = weight if plain_weight(x, weight, offset) else _factor(weight, offset, wide)
    blocks = list(row_blocks(*rows.shape, x, wide))
    widened = None if x.dtype == wide else scratch(blocks, rows.shape[1], x, wide)
    for block in blocks:
        own, result = rows[block], out[block]
        unit = result if widened is None else widened[: own.shape[0]].copy_(own)
        scale = inverse_rms[block]
        torch.linalg.vector_norm(own if widened is None else unit, dim=-1, keepdim=True, out=scale)
        torch.addcmul(smallest, scale, scale, value=1 / rows.shape[1], out=scale).rsqrt_()
        torch.mul(own if widened is None else unit, scale, out=unit)
        if factor.dtype == x.dtype:
            result.copy_(unit).mul_(factor)
        else:
            result.copy_(unit.mul_(factor))
    return out.view(x.shape), inverse_rms


def _gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    inverse_rms: Tensor,
    offset: float,
    needs_x: bool,
    needs_weight: bool,
    beside: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x, with `beside` added before it is rounded to x's dtype, and of weight."""
    # With r = 1 / rms: dL/dx = r (g w - x r^2 mean(g w x)), dL/dw = sum over rows of r g x.
    wide = inverse_rms.dtype
    rows, grads, factor = _rows(x), _rows(grad), _factor(weight, offset, wide)
    grad_x = torch.empty_like(rows) if needs_x else None
    grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
    blocks = list(row_blocks(*rows.shape, x, wide))
    product = scratch(blocks, rows.shape[1], x, wide)
    widened = None if x.dtype == wide else (torch.empty_like(product), torch.empty_like(product))
    for block in blocks:
        own, given, r = rows[block], grads[block], inverse_rms[block]
        count = own.shape[0]
        result = None if grad_x is None else grad_x[block]
        if widened is not None:
            own, given = (held[:count].copy_(narrow) for held, narrow in zip(widened, (own, given)))
        both = torch.mul(given, own, out=product[:count])
        if grad_weight is not None:
            grad_weight.addmv_(both.t(), r.squeeze(-1))
        if result is None:
            continue
        projection = (both @ factor).unsqueeze(-1).mul_(r).mul_(r).mul_(-1 / rows.shape[1])
        total = both if widened is not None else result
        torch.mul(given, factor, out=total).addcmul_(own, projection).mul_(r)
        if beside is not None:
            total.add_(beside.reshape(rows.shape)[block])
        if widened is not None:
            result.copy_(total)
    return None if grad_x is None else grad_x.view(x.shape), None if grad_weight is None else grad_weight.to(
        weight.dtype
    )


def _rows(x: Tensor) -> Tensor:
    """[..., h] -> [rows, h], contiguous."""
    return x.reshape(-1, x.shape[-1]).contiguous()


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        out, inverse_rms = _normalize(x, weight, eps, offset)
        ctx.offset = offset
        ctx.save_for_backward(x, weight, inverse_rms)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, inverse_rms = ctx.saved_tensors
        return *_gradients(grad, x, weight, inverse_rms, ctx.offset, *ctx.needs_input_grad[:2]), None, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
        total = x + residual
        out, inverse_rms = _normalize(total, weight, eps, offset)
        ctx.offset = offset
        ctx.dtypes = x.dtype, residual.dtype
        ctx.save_for_backward(total, weight, inverse_rms)
        return out, total

    @staticmethod
    def backward(ctx, grad: Tensor, grad_total: Tensor):
        total, weight, inverse_rms = ctx.saved_tensors
        needs_sum = any(ctx.needs_input_grad[:2])
        needs = needs_sum, ctx.needs_input_grad[2]
        grad_sum, grad_weight = _gradients(grad, total, weight, inverse_rms, ctx.offset, *needs, beside=grad_total)
        if not needs_sum:
            return None, None, grad_weight, None, None
        return *(grad_sum.to(dtype) for dtype in ctx.dtypes), grad_weight, None, None


@register("layer_norm", "torch")
def torch_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """torch's own kernel, with x widened where weight and bias are fp32 and x is not."""
    factor = weight + offset if offset else weight
    if factor.dtype == x.dtype == bias.dtype:
        return F.layer_norm(x, weight.shape, factor, bias, eps)
    wide = _wide(x.dtype)
    return F.layer_norm(x.to(wide), weight.shape, factor.to(wide), bias.to(wide), eps).to(x.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _factor(weight: Tensor, offset: float, dtype: torch.dtype) -> Tensor:
    """What multiplies the normalised value, in `dtype`."""
    return weight.to(dtype) + offset if offset else weight.to(dtype)


@register("rms_norm", REFERENCE, priority=-1)
def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """The formula, differentiated by autograd."""
    wide = x.to(_wide(x.dtype))
    unit = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if plain_weight(x, weight, offset):
        return unit.to(x.dtype) * weight
    return (unit * _factor(weight, offset, unit.dtype)).to(x.dtype)


@register("add_rms_norm", REFERENCE, priority=-1)
def add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """One after the other, differentiated by autograd."""
    total = x + residual
    return rms_norm_reference(total, weight, eps, offset), total


@register("layer_norm", REFERENCE, priority=-1)
def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """The formula, differentiated by autograd."""
    wide = x.to(_wide(x.dtype))
    centred = wide - wide.mean(-1, keepdim=True)
    unit = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    return (unit * _factor(weight, offset, unit.dtype) + bias.to(unit.dtype)).to(x.dtype)
