"""Grouped matrix products by `npu_grouped_matmul`, one kernel for all groups; torch_npu has no derivative of it."""

from __future__ import annotations

import torch
from torch import Tensor

from mindspeed_llm.ops.grouped_matmul import by_group
from mindspeed_llm.ops.npu.kernels import DEVICES, FLOATS, REQUIRES
from mindspeed_llm.ops.registry import register

# group_type: what the groups divide.
ROWS, INNER = 0, 2
ENDS = 0  # group_list_type: the list has the ends of the groups
ONE_TENSOR = 3  # split_item: one result for all groups
LARGEST_WIDTH = 65535


@register("grouped_matmul", "npu_grouped_matmul", devices=DEVICES, requires=REQUIRES, priority=1)
def npu_grouped_matmul(x: Tensor, weight: Tensor, group_sizes: Tensor) -> Tensor:
    """Rows [t, k] times weights [g, n, k] transposed -> [t, n], see `ops.grouped_matmul.grouped_matmul`."""
    fits = x.dtype in FLOATS and x.dtype == weight.dtype and max(weight.shape[1:]) <= LARGEST_WIDTH and x.shape[0] > 0
    if not fits:
        return by_group(x, weight, group_sizes)
    ends = group_sizes.to(torch.int64).cumsum(0).to(x.device, non_blocking=True)
    return _GroupedMatmul.apply(x, weight, ends)


def _product(x: Tensor, weight: Tensor, ends: Tensor, group_type: int) -> Tensor:
    (product,) = torch.ops.npu.npu_grouped_matmul(
        [x], [weight], group_list=ends, split_item=ONE_TENSOR, group_type=group_type, group_list_type=ENDS
    )
    return product


class _GroupedMatmul(torch.autograd.Function):
    """y = x W^T: dx = dy W by rows, dW = dy^T x by the inner dimension, whose groups are the rows."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        return _product(x, weight.transpose(1, 2), ends, ROWS)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, ends = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = _product(grad, weight, ends, ROWS) if ctx.needs_input_grad[0] else None
        grad_weight = _product(grad.t(), x, ends, INNER) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None
