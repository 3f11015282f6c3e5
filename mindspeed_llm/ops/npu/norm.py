"""RMSNorm, also of a sum, in one kernel each way; the weight is multiplied before the result is rounded."""

from __future__ import annotations

import torch
from torch import Tensor

from mindspeed_llm.ops.norm import composed_add_rms_norm, plain_weight, two_pass_rms_norm
from mindspeed_llm.ops.npu.kernels import DEVICES, FLOATS, REQUIRES
from mindspeed_llm.ops.registry import register


@register("rms_norm", "npu_rms_norm", devices=DEVICES, requires=REQUIRES, priority=1)
def npu_rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """torch_npu's, which keeps x and one number per row for its own backward kernel."""
    if x.dtype not in FLOATS or not plain_weight(x, weight, offset):
        return two_pass_rms_norm(x, weight, eps, offset)
    return torch.ops.npu.npu_rms_norm(x, weight, epsilon=eps)[0]


@register("add_rms_norm", "npu_add_rms_norm", devices=DEVICES, requires=REQUIRES, priority=2)
def npu_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """torch_npu's, which has no derivative there: backwards the norm's kernel, then the sum's gradient is added."""
    alike = x.dtype == residual.dtype and x.shape == residual.shape and x.numel() > 0
    if not alike or x.dtype not in FLOATS or not plain_weight(x, weight, offset):
        return composed_add_rms_norm(x, residual, weight, eps, offset)
    return _AddRMSNorm.apply(x, residual, weight, eps)


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        normed, inverse_rms, total = torch.ops.npu.npu_add_rms_norm(x, residual, weight, epsilon=eps)
        ctx.save_for_backward(total, weight, inverse_rms)
        return normed, total

    @staticmethod
    def backward(ctx, grad: Tensor, grad_total: Tensor):
        total, weight, inverse_rms = ctx.saved_tensors
        grad_sum, grad_weight = torch.ops.npu.npu_rms_norm_backward(grad.contiguous(), total, weight, inverse_rms)
        grad_sum = grad_sum + grad_total
        return grad_sum, grad_sum, grad_weight.to(weight.dtype), None
