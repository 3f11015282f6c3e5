"""Liger-Kernel's Triton kernels, called as its 0.8 defines them.

Each is called through the autograd function of `liger_kernel.ops`; kernels that write over what they are given get
copies of their own. Sources: github.com/linkedin/Liger-Kernel, arXiv 2410.10989.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_llm.ops.activation import Gate, torch_gated_activation
from mindspeed_llm.ops.cross_entropy import IGNORE_INDEX, chunked_linear_cross_entropy_sum
from mindspeed_llm.ops.norm import plain_weight, two_pass_add_rms_norm, two_pass_rms_norm
from mindspeed_llm.ops.registry import register
from mindspeed_llm.ops.rotary import fused_split_qkv_rotary
from mindspeed_llm.ops.swiglu import torch_swiglu

DEVICES = ("cuda",)
REQUIRES = ("liger_kernel", "triton")
# Types that the kernels compute in; float64 goes elsewhere.
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def _casting(x: Tensor, weight: Tensor, offset: float) -> str:
    """Which of Liger's orders of rounding is this library's (ops.norm): before the weight multiplies, or after."""
    return "llama" if plain_weight(x, weight, offset) else "gemma"


@register("rms_norm", "liger", devices=DEVICES, requires=REQUIRES, priority=1)
def liger_rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """One kernel each way."""
    if x.dtype not in FLOATS or not x.numel():
        return two_pass_rms_norm(x, weight, eps, offset)
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    in_place = False  # the gradient that arrives may be used by others, a residual connection say
    return LigerRMSNormFunction.apply(x, weight, eps, offset, _casting(x, weight, offset), in_place)


@register("add_rms_norm", "liger", devices=DEVICES, requires=REQUIRES, priority=2)
def liger_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Sum and norm in one kernel each way."""
    if x.dtype not in FLOATS or x.dtype != residual.dtype or not x.numel():
        return two_pass_add_rms_norm(x, residual, weight, eps, offset)
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    in_place = False
    return LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps, offset, _casting(x, weight, offset), in_place)


@register("swiglu", "liger", devices=DEVICES, requires=REQUIRES, priority=1)
def liger_swiglu(gate_up: Tensor) -> Tensor:
    """One kernel each way, which reads both halves where they are."""
    if gate_up.dtype not in FLOATS or not gate_up.numel():
        return torch_swiglu(gate_up)
    from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction

    return _shaped(LigerFusedGateUpSiLUMulFunction, gate_up)


def _shaped(function: type[torch.autograd.Function], gate_up: Tensor) -> Tensor:
    # Its backward returns a gradient of two dimensions, whatever the input had.
    out = function.apply(gate_up.reshape(-1, gate_up.shape[-1]))
    return out.view(*gate_up.shape[:-1], out.shape[-1])


@register("gated_activation", "liger", devices=DEVICES, requires=REQUIRES, priority=1)
def liger_gated_activation(gate_up: Tensor, gate: Gate) -> Tensor:
    """GeGLU with gelu by tanh in one kernel each way; other gates are torch's."""
    if gate != Gate("gelu_tanh") or gate_up.dtype not in FLOATS or not gate_up.numel():
        return torch_gated_activation(gate_up, gate)
    from liger_kernel.ops.geglu import LigerGELUMulFunction

    # Its backward writes the gradients over the two halves it saved: contiguous() of a half is a copy.
    left, right = (part.contiguous() for part in gate_up.chunk(2, dim=-1))
    return LigerGELUMulFunction.apply(left, right)


@register("split_qkv_rotary", "liger", devices=DEVICES, requires=REQUIRES, priority=1)
def liger_split_qkv_rotary(
    qkv: Tensor, num_groups: int, head_dim: int, table: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Three copies, then queries and keys rotated in place by one kernel; backwards one kernel and three copies."""
    if table is None or qkv.dtype not in FLOATS or not qkv.numel():
        return fused_split_qkv_rotary(qkv, num_groups, head_dim, table)
    return _SplitRotate.apply(qkv, num_groups, head_dim, table)


def _rows(x: Tensor) -> Tensor:
    """[s, b, n, d] as the kernel names dimensions, [1, n, s b, d], without moving anything."""
    return x.flatten(0, 1)[None].transpose(1, 2)


def _table_rows(table: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """cos and sin [1, s b, r/2]."""
    return tuple(part.expand(-1, batch, -1, -1).reshape(1, -1, part.shape[-1]) for part in table.unbind(0))


class _SplitRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv: Tensor, num_groups: int, head_dim: int, table: Tensor):
        from liger_kernel.ops.rope import rope_forward

        s, b, _ = qkv.shape
        grouped = qkv.view(s, b, num_groups, -1, head_dim)
        ctx.queries = grouped.shape[3] - 2
        ctx.save_for_backward(table)
        # Copies even where a view would do: the kernel writes over what it is given.
        query = grouped[..., :-2, :].clone(memory_format=torch.contiguous_format).view(s, b, -1, head_dim)
        key = grouped[..., -2, :].clone(memory_format=torch.contiguous_format)
        cos, sin = _table_rows(table, b)
        turned_query, turned_key, _, _ = rope_forward(_rows(query), _rows(key), cos, sin, rotary_dim=2 * cos.shape[-1])
        shapes = query.shape, key.shape
        query, key = (t.transpose(1, 2).reshape(shape) for t, shape in zip((turned_query, turned_key), shapes))
        return query, key, grouped[..., -1, :].contiguous()

    @staticmethod
    def backward(ctx, grad_query: Tensor, grad_key: Tensor, grad_value: Tensor):
        from liger_kernel.ops.rope import rope_backward

        (table,) = ctx.saved_tensors
        s, b, g, d = grad_key.shape
        cos, sin = _table_rows(table, b)
        turned = (t.clone(memory_format=torch.contiguous_format) for t in (grad_query, grad_key))
        grad_query, grad_key = rope_backward(*map(_rows, turned), cos, sin, rotary_dim=2 * cos.shape[-1])
        grad = grad_value.new_empty(s, b, g, ctx.queries + 2, d)
        grad[..., :-2, :] = grad_query.transpose(1, 2).reshape(s, b, g, ctx.queries, d)
        grad[..., -2, :] = grad_key.transpose(1, 2).reshape(s, b, g, d)
        grad[..., -1, :] = grad_value
        return grad.view(s, b, -1), None, None, None


# Not chosen by itself: it computes unlabelled rows too, and asks the device for the number of labels besides.
@register("linear_cross_entropy_sum", "liger", devices=DEVICES, requires=REQUIRES, priority=-1)
def liger_linear_cross_entropy_sum(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """Liger's chunks of its own size; where ranks share the vocabulary or the caller sizes chunks, ours."""
    shared = group is not None and group.size() > 1
    # fp16 gradients would be rounded before the loss scale reaches them.
    if shared or chunk_rows is not None or hidden.dtype not in (torch.bfloat16, torch.float32) or not hidden.numel():
        return chunked_linear_cross_entropy_sum(hidden, weight, labels, vocab_size, group, chunk_rows)
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    bias = class_weights = softcap = None
    z_loss = smoothing = 0.0
    loss, *_ = LigerFusedLinearCrossEntropyFunction.apply(
        hidden,
        weight[:vocab_size],
        labels,
        bias,
        class_weights,
        IGNORE_INDEX,
        z_loss,
        smoothing,
        "sum",
        softcap,
        False,  # the z loss beside the loss
        torch.float32,  # sums of weight gradients over chunks
    )
    return loss.float()
