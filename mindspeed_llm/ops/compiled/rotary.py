"""Rotary embedding in the half layout, also with the split of linear_qkv, each way one kernel.

Channels and heads are compiled in: a model has one or two sizes of them. Neighbouring channels stay one product of
complex numbers (`ops/rotary.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mindspeed_llm.ops.compiled import enter
from mindspeed_llm.ops.compiled.kernel import kernel
from mindspeed_llm.ops.rotary import fused_rotary, fused_split_qkv_rotary

# Query heads of a group whose gradients are written side by side, each by code of its own: that of many would take long
# to compile, so they are put together before, which costs a copy of them.
MOST_APART = 8


@enter("rotary")
def compiled_rotary(x: Tensor, table: Tensor) -> Tensor:
    """One pass each way; nothing but the table is saved."""
    return _Rotate.apply(x, table) if _fits(x) else fused_rotary(x, table)


@enter("split_qkv_rotary")
def compiled_split_qkv_rotary(
    qkv: Tensor, num_groups: int, head_dim: int, table: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """One pass each way; the results are contiguous and qkv is not kept."""
    if table is None or not _fits(qkv):
        return fused_split_qkv_rotary(qkv, num_groups, head_dim, table)
    return _SplitRotate.apply(qkv, num_groups, head_dim, table)


def _fits(x: Tensor) -> bool:
    return x.shape[0] * x.shape[1] > 1


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    """x [..., d] by cos and sin [..., t], in their type: what stands side by side in the last dimension.

    Each is rounded by itself: wide tensors put together would be memory of their own, read and rounded afterwards.
    """
    half = cos.shape[-1]
    first, second = x[..., :half].to(cos.dtype), x[..., half : 2 * half].to(cos.dtype)
    turned = [(first * cos - second * sin).to(x.dtype), (second * cos + first * sin).to(x.dtype)]
    return [*turned, x[..., 2 * half :]] if 2 * half < x.shape[-1] else turned


def _angles(table: Tensor, backwards: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, wide, of table [2, r, t]."""
    cos, sin = table.to(torch.promote_types(torch.promote_types(table.dtype, dtype), torch.float32)).unbind(0)
    return cos, -sin if backwards else sin


@kernel("r heads channels", "2 r turning")
def rotate(x: Tensor, table: Tensor, *, backwards: bool) -> Tensor:
    """Every head of every row by its row's angles."""
    cos, sin = _angles(table, backwards, x.dtype)
    return torch.cat(_turned(x, cos[:, None], sin[:, None]), -1)


@kernel("r groups parts channels", "2 r turning")
def split(qkv: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turned queries [r, g, n/g, d] and keys [r, g, d], and values [r, g, d]."""
    cos, sin = _angles(table, False, qkv.dtype)
    query = torch.cat(_turned(qkv[:, :, :-2], cos[:, None, None], sin[:, None, None]), -1)
    return query, torch.cat(_turned(qkv[:, :, -2], cos[:, None], sin[:, None]), -1), qkv[:, :, -1].clone()


@kernel("r groups queries channels", "r groups channels", "r groups channels", "2 r turning")
def join(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
    """The gradient of qkv from those of `split`'s results, [r, groups, parts * channels]."""
    cos, sin = (angle[:, None] for angle in _angles(table, True, key.dtype))
    if query.shape[2] > MOST_APART:
        queries = [torch.cat(_turned(query, cos[:, None], sin[:, None]), -1).flatten(2)]
    else:
        queries = [part for head in query.unbind(2) for part in _turned(head, cos, sin)]
    return torch.cat((*queries, *_turned(key, cos, sin), value), -1)


def _row_angles(table: Tensor, s: int, b: int) -> Tensor:
    """[2, s, b or 1, 1, t] -> [2, s b, t]."""
    return table.detach().expand(2, s, b, 1, table.shape[-1]).reshape(2, s * b, table.shape[-1]).contiguous()


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(table)
        return _Rotate.turn(x, table, backwards=False)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _Rotate.turn(grad, *ctx.saved_tensors, backwards=True), None

    @staticmethod
    def turn(x: Tensor, table: Tensor, backwards: bool) -> Tensor:
        """x [s, b, n, d] turned."""
        rows = x.detach().reshape(-1, *x.shape[2:]).contiguous()
        return rotate(rows, _row_angles(table, *x.shape[:2]), backwards=backwards).view(x.shape)


class _SplitRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv: Tensor, num_groups: int, head_dim: int, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s, b, width = qkv.shape
        ctx.save_for_backward(table)
        ctx.queries = width // (num_groups * head_dim) - 2
        grouped = qkv.detach().reshape(s * b, num_groups, ctx.queries + 2, head_dim).contiguous()
        query, key, value = split(grouped, _row_angles(table, s, b))
        shape = s, b, num_groups, head_dim
        return query.view(s, b, num_groups * ctx.queries, head_dim), key.view(shape), value.view(shape)

    @staticmethod
    def backward(ctx, grad_query: Tensor, grad_key: Tensor, grad_value: Tensor) -> tuple[Tensor | None, ...]:
        s, b, g, d = grad_key.shape
        query = grad_query.reshape(s * b, g, ctx.queries, d).contiguous()
        key, value = (grad.reshape(s * b, g, d).contiguous() for grad in (grad_key, grad_value))
        joined = join(query, key, value, _row_angles(*ctx.saved_tensors, s, b))
        return joined.view(s, b, -1), None, None, None
