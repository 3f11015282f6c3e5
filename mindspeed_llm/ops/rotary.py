"""Rotary position embedding: two channels turn together by the angle position * inv_freq[i].

[x1, x2] -> [x1 cos - x2 sin, x2 cos + x1 sin] on the first r of the d channels, the others unchanged. In the half
layout (GPT-NeoX, Llama) channel i turns with channel i + r/2; interleaved (GPT-J) with its neighbour, 2i with 2i + 1.
With a table wider than x the rotation is computed in the table's type and rounded once. Source: arXiv 2104.09864.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mindspeed_llm.ops.registry import REFERENCE, implementation, register
from mindspeed_llm.ops.row_blocks import row_blocks


def rotary_table(position_ids: Tensor, inv_freq: Tensor, attention_factor: float, dtype: torch.dtype) -> Tensor:
    """cos and sin for one forward pass.

    Args:
        position_ids: integer [b, s] (b may be 1 when all rows agree).
        inv_freq: fp32 [r/2].
        attention_factor: multiplies both.
        dtype: of the activations; angles are computed in fp32.

    Returns:
        [2, s, b, 1, r/2]: cos, sin.
    """
    angles = position_ids.t()[:, :, None, None].to(inv_freq.dtype) * inv_freq
    table = torch.stack((angles.cos(), angles.sin()))
    if attention_factor != 1.0:
        table = table * attention_factor
    return table.to(dtype)


def apply_rotary(x: Tensor, table: Tensor) -> Tensor:
    """Rotate x [s, b, n, d] by a table of `rotary_table`; returns a tensor of the same shape."""
    return implementation("rotary")(x, table)


def apply_interleaved_rotary(x: Tensor, table: Tensor) -> Tensor:
    """The rotation for x [s, b, n, r] whose neighbouring channels (0, 1), (2, 3), ... turn together (DeepSeek).

    The result is in the half layout: the same permutation of queries and keys leaves their products as they are.
    """
    pairs = x.unflatten(-1, (-1, 2)).transpose(-1, -2)
    return apply_rotary(pairs.flatten(-2), table)


def apply_neighbour_rotary(x: Tensor, table: Tensor) -> Tensor:
    """Rotate x [s, b, n, d] in the interleaved layout, which the result keeps."""
    return implementation("neighbour_rotary")(x, table)


@register("rotary", "fused")
def fused_rotary(x: Tensor, table: Tensor) -> Tensor:
    """One pass each way; nothing but the table is saved."""
    return _Rotate.apply(x, table, False)


@register("neighbour_rotary", "fused")
def fused_neighbour_rotary(x: Tensor, table: Tensor) -> Tensor:
    """One pass each way over every other channel; nothing but the table is saved."""
    return _Rotate.apply(x, table, True)


@register("neighbour_rotary", "complex", devices=("cpu",), priority=1)
def complex_neighbour_rotary(x: Tensor, table: Tensor) -> Tensor:
    """One product of complex numbers each way, in fp32 at least; nothing but the table is saved."""
    return _Turn.apply(x, table)


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(table)
        return _turned(x, *table)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        cos, sin = ctx.saved_tensors[0]
        return _turned(grad, cos, -sin), None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbouring channels of x [s, b, n, d] as complex numbers times cos + i sin."""
    turning, wide = 2 * cos.shape[-1], torch.promote_types(torch.promote_types(x.dtype, cos.dtype), torch.float32)
    turn = torch.complex(cos.to(wide), sin.to(wide))
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.dtype == wide and turning == x.shape[-1]:
        source, target = (torch.view_as_complex(y.unflatten(-1, (turning // 2, 2))) for y in (x.contiguous(), out))
        torch.mul(source, turn, out=target)
        return out
    for block in row_blocks(x.shape[0], x[:1].numel(), x, wide):
        pairs = x[block, ..., :turning].to(wide).contiguous().unflatten(-1, (turning // 2, 2))
        turned = torch.view_as_complex(pairs) * turn[block]
        out[block, ..., :turning] = torch.view_as_real(turned).flatten(-2)
        out[block, ..., turning:] = x[block, ..., turning:]
    return out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, table: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(table)
        ctx.interleaved = interleaved
        return rotate(x, table, torch.empty(x.shape, dtype=x.dtype, device=x.device), interleaved=interleaved)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (table,) = ctx.saved_tensors
        out = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
        return rotate(grad, table, out, backwards=True, interleaved=ctx.interleaved), None, None


def rotate(x: Tensor, table: Tensor, out: Tensor, backwards: bool = False, interleaved: bool = False) -> Tensor:
    """Write the rotation of x [s, b, ..., d] into `out` (not x itself); backwards turns the other way."""
    turning = 2 * table.shape[-1]
    cos, sin = _for_every_channel(
        table.view(*table.shape[:3], *(1,) * (x.dim() - 3), turning // 2), backwards, interleaved
    )
    for block in row_blocks(x.shape[0], x[:1].numel(), x, table.dtype):
        own, result = x[block, ..., :turning], out[block, ..., :turning]
        if table.dtype == x.dtype:
            torch.mul(own, cos[block], out=result).addcmul_(_partners(own, interleaved), sin[block])
        else:
            own = own.to(table.dtype)
            result.copy_((own * cos[block]).addcmul_(_partners(own, interleaved), sin[block]))
        if turning < x.shape[-1]:
            out[block, ..., turning:] = x[block, ..., turning:]
    return out


def _for_every_channel(table: Tensor, backwards: bool, interleaved: bool) -> tuple[Tensor, Tensor]:
    """What a channel and what its partner is multiplied by, [s, b, ..., r]: long rows for the kernels."""
    cos, sin = table
    first, second = (sin, -sin) if backwards else (-sin, sin)
    if interleaved:
        return cos.repeat_interleave(2, dim=-1), torch.stack((first, second), dim=-1).flatten(-2)
    return torch.cat((cos, cos), dim=-1), torch.cat((first, second), dim=-1)


def _partners(x: Tensor, interleaved: bool) -> Tensor:
    """In the place of each of the r channels of x the one that turns with it."""
    if interleaved:
        return torch.stack((x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)
    return torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1)


def split_qkv_rotary(
    qkv: Tensor, num_groups: int, head_dim: int, table: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Take apart the output of linear_qkv and rotate queries and keys, in one step each way.

    Args:
        qkv: [s, b, g * (n/g + 2) * d], grouped as Megatron does: for each of g groups n/g queries, a key, a value.
        num_groups: g on this rank.
        head_dim: d.
        table: from `rotary_table`; None leaves queries and keys unrotated (they are normalised first, say).

    Returns:
        query [s, b, n, d], key [s, b, g, d], value [s, b, g, d].
    """
    return implementation("split_qkv_rotary")(qkv, num_groups, head_dim, table)


def _grouped(qkv: Tensor, num_groups: int, head_dim: int) -> Tensor:
    """[s, b, g (n/g + 2) d] -> [s, b, g, n/g + 2, d]."""
    return qkv.view(*qkv.shape[:2], num_groups, qkv.shape[-1] // (num_groups * head_dim), head_dim)


@register("split_qkv_rotary", "fused")
def fused_split_qkv_rotary(
    qkv: Tensor, num_groups: int, head_dim: int, table: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """One pass each way; the results are contiguous and qkv is not kept."""
    return _SplitRotate.apply(qkv, num_groups, head_dim, table)


class _SplitRotate(torch.autograd.Function):
    """Autograd's own derivative of three slices would fill and add three tensors of the size of qkv."""

    @staticmethod
    def forward(ctx, qkv: Tensor, num_groups: int, head_dim: int, table: Tensor | None):
        s, b, _ = qkv.shape
        grouped = _grouped(qkv, num_groups, head_dim)
        queries = grouped.shape[3] - 2
        ctx.queries, ctx.has_table = queries, table is not None
        ctx.save_for_backward(*(() if table is None else (table,)))
        query = qkv.new_empty(s, b, num_groups, queries, head_dim)
        key = qkv.new_empty(s, b, num_groups, head_dim)
        if table is None:
            query.copy_(grouped[..., :-2, :])
            key.copy_(grouped[..., -2, :])
        else:
            rotate(grouped[..., :-2, :], table, query)
            rotate(grouped[..., -2, :], table, key)
        # A copy, so that qkv can be freed: attention saves its value.
        return query.view(s, b, num_groups * queries, head_dim), key, grouped[..., -1, :].contiguous()

    @staticmethod
    def backward(ctx, grad_query: Tensor, grad_key: Tensor, grad_value: Tensor):
        s, b, g, d = grad_key.shape
        grad = grad_key.new_empty(s, b, g, ctx.queries + 2, d)
        grad_query = grad_query.unflatten(2, (g, ctx.queries))
        if ctx.has_table:
            (table,) = ctx.saved_tensors
            rotate(grad_query, table, grad[..., :-2, :], backwards=True)
            rotate(grad_key, table, grad[..., -2, :], backwards=True)
        else:
            grad[..., :-2, :] = grad_query
            grad[..., -2, :] = grad_key
        grad[..., -1, :] = grad_value
        return grad.flatten(2), None, None, None


@register("rotary", REFERENCE, priority=-1)
def apply_rotary_reference(x: Tensor, table: Tensor) -> Tensor:
    """The formula, differentiated by autograd."""
    cos, sin = table.unbind(0)
    half = cos.shape[-1]
    x1, x2, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat(((x1 * cos - x2 * sin).to(x.dtype), (x2 * cos + x1 * sin).to(x.dtype), rest), dim=-1)


@register("neighbour_rotary", REFERENCE, priority=-1)
def apply_neighbour_rotary_reference(x: Tensor, table: Tensor) -> Tensor:
    """The formula, differentiated by autograd."""
    cos, sin = table.unbind(0)
    turning, rest = x[..., : 2 * cos.shape[-1]], x[..., 2 * cos.shape[-1] :]
    x1, x2 = turning[..., 0::2], turning[..., 1::2]
    turned = torch.stack((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).flatten(-2)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


@register("split_qkv_rotary", REFERENCE, priority=-1)
def split_qkv_rotary_reference(
    qkv: Tensor, num_groups: int, head_dim: int, table: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Slices, then the formula, differentiated by autograd."""
    grouped = _grouped(qkv, num_groups, head_dim)
    query, key, value = grouped[..., :-2, :].flatten(2, 3), grouped[..., -2, :], grouped[..., -1, :]
    if table is None:
        return query, key, value
    return apply_rotary_reference(query, table), apply_rotary_reference(key, table), value
