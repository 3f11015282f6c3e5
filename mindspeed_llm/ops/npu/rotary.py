"""Rotary embedding by `npu_rotary_mul`: cos * x + sin * turned(x), where turned([x1, x2]) = [-x2, x1].

turned is antisymmetric and sin is the same in both halves, so the gradient of x is the rotation by the opposite angle:
the same kernel with -sin. torch_npu's backward kernel would also compute gradients of cos and sin, which nobody wants.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mindspeed_llm.ops.npu.kernels import DEVICES, FLOATS, REQUIRES
from mindspeed_llm.ops.registry import register
from mindspeed_llm.ops.rotary import fused_rotary, fused_split_qkv_rotary

# Limits of the kernel: head size, and batch and heads.
LARGEST_HEAD = 894
LARGEST_COUNT = 999


@register("rotary", "npu_rotary_mul", devices=DEVICES, requires=REQUIRES, priority=1)
def npu_rotary(x: Tensor, table: Tensor) -> Tensor:
    """One kernel each way; nothing but the table is saved."""
    if not _fits(x, table):
        return fused_rotary(x, table)
    return _Rotate.apply(x, table)


@register("split_qkv_rotary", "npu_rotary_mul", devices=DEVICES, requires=REQUIRES, priority=1)
def npu_split_qkv_rotary(
    qkv: Tensor, num_groups: int, head_dim: int, table: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Three copies and two rotations; backwards two rotations into one tensor."""
    if table is None or not _fits(qkv.unflatten(-1, (-1, head_dim)), table):
        return fused_split_qkv_rotary(qkv, num_groups, head_dim, table)
    return _SplitRotate.apply(qkv, num_groups, head_dim, table)


def _fits(x: Tensor, table: Tensor) -> bool:
    width = 2 * table.shape[-1]
    same = x.dtype == table.dtype
    return same and x.dtype in FLOATS and width <= LARGEST_HEAD and max(x.shape[1:3]) <= LARGEST_COUNT and x.numel() > 0


def rotated(x: Tensor, table: Tensor, backwards: bool = False) -> Tensor:
    """Rotate x [s, b, n, d] by a table [2, s, b or 1, 1, r/2]; backwards turns the other way."""
    cos, sin = torch.cat((table, table), dim=-1).unbind(0)
    if backwards:
        sin = -sin
    width = cos.shape[-1]
    turning = x[..., :width]
    if table.shape[2] == 1:
        turned = torch.ops.npu.npu_rotary_mul(turning.contiguous(), cos, sin, "half")
    else:
        # Angles that differ between rows are taken in one layout only: [b, n, s, d] with [b, 1, s, d].
        parts = (part.permute(1, 2, 0, 3).contiguous() for part in (turning, cos, sin))
        turned = torch.ops.npu.npu_rotary_mul(*parts, "half").permute(2, 0, 1, 3)
    return turned if width == x.shape[-1] else torch.cat((turned, x[..., width:]), dim=-1)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(table)
        return rotated(x, table)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (table,) = ctx.saved_tensors
        return rotated(grad, table, backwards=True), None


class _SplitRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv: Tensor, num_groups: int, head_dim: int, table: Tensor):
        s, b, _ = qkv.shape
        grouped = qkv.view(s, b, num_groups, -1, head_dim)
        ctx.queries = grouped.shape[3] - 2
        ctx.save_for_backward(table)
        query = grouped[..., :-2, :].reshape(s, b, -1, head_dim)
        # A copy, so that qkv can be freed: attention saves its value.
        value = grouped[..., -1, :].contiguous()
        return rotated(query, table), rotated(grouped[..., -2, :], table), value

    @staticmethod
    def backward(ctx, grad_query: Tensor, grad_key: Tensor, grad_value: Tensor):
        (table,) = ctx.saved_tensors
        s, b, g, d = grad_key.shape
        grad = grad_key.new_empty(s, b, g, ctx.queries + 2, d)
        grad[..., :-2, :] = rotated(grad_query, table, backwards=True).unflatten(2, (g, ctx.queries))
        grad[..., -2, :] = rotated(grad_key, table, backwards=True)
        grad[..., -1, :] = grad_value
        return grad.view(s, b, -1), None, None, None
