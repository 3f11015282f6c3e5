"""Attention with soft-capped scores and sinks, in blocks of rows: what torch's fused attention has no form for.

Attention without a sink gives out and lse (ops.attention_part). With a sink z: L = log(exp(lse) + exp(z)) and
out' = exp(lse - L) out. P = exp(S - L) and D = sum(dO out') then give all gradients as for a part of a whole, the sink
being the other part, of value 0: dz = - sum over rows of exp(z - L) D.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mindspeed_llm.ops.attention_part import (
    attention_part,
    attention_part_backward,
    part_backward_by_rows,
    part_by_rows,
)
from mindspeed_llm.ops.registry import register


@register("attention", "rows", priority=-1)
def row_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: int | None,
    dropout: float,
    scale: float | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """As `ops.attention.attention`; it saves the output and a number per row, and computes the weights again.

    Raises:
        ValueError: dropout is asked for.
    """
    if dropout:
        raise ValueError(f"attention in rows has no dropout, not {dropout}")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _Rows.apply(query, key, value, sinks, window_size, scale, softcap).flatten(2)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, sinks, window_size, scale, softcap) -> Tensor:
        shift = key.shape[0] - query.shape[0]
        if softcap is None:
            out, lse = attention_part(query, key, value, shift=shift, window_size=window_size, scale=scale)
        else:
            out, lse = part_by_rows(query, key, value, shift, window_size, scale, None, softcap)
        if sinks is not None:
            total = torch.logaddexp(lse, sinks.to(lse.dtype))
            out = out * (lse - total).exp().unsqueeze(-1)
            lse = total
        ctx.options = (shift, window_size, scale, softcap)
        ctx.save_for_backward(query, key, value, sinks, out, lse)
        return out.to(query.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, out, lse = ctx.saved_tensors
        shift, window_size, scale, softcap = ctx.options
        tensors = (grad, query, key, value, out, lse)
        if softcap is None:
            gradients = attention_part_backward(*tensors, shift=shift, window_size=window_size, scale=scale)
        else:
            gradients = part_backward_by_rows(*tensors, shift, window_size, scale, None, softcap)
        grad_sinks = None
        if sinks is not None:
            share = (sinks.to(lse.dtype) - lse).exp()
            grad_sinks = -(share * (grad.to(out.dtype) * out).sum(-1)).sum((0, 1)).to(sinks.dtype)
        narrow = (g.to(x.dtype) for g, x in zip(gradients, (query, key, value)))
        return *narrow, grad_sinks, None, None, None
