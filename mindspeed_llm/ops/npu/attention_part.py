"""Parts of ring attention by the kernels of `npu_fusion_attention`.

The kernel gives the maximum m of a row's scores and the sum l of exp(score - m): lse = m + log l. Its backward kernel
computes P = exp(S - m) / l from whatever m and l it is handed, so with m = lse of all keys and l = 1 it gives a part's
share of the gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mindspeed_llm.ops.attention_part import merge_by_weights, part_backward_by_rows, part_by_rows
from mindspeed_llm.ops.npu.attention import fits
from mindspeed_llm.ops.npu.kernels import DEVICES, REQUIRES
from mindspeed_llm.ops.npu.visibility import seen_in_order, whole
from mindspeed_llm.ops.registry import register

# The kernel stores its statistics eight times over.
COPIES = 8


def _order(
    query: Tensor, num_keys: int, shift: int, window_size: int | None, hidden: Tensor | None, blind: Tensor | None
) -> dict[str, Any]:
    if hidden is not None:
        return whole(hidden & ~blind)
    return seen_in_order(query.shape[0], num_keys, shift, window_size, query.device)


def _visible_keys(query: Tensor, key: Tensor, shift: int, hidden: Tensor | None) -> int:
    """How many of the first keys any query may see."""
    return key.shape[0] if hidden is not None else min(key.shape[0], query.shape[0] + shift)


def _blind(hidden: Tensor | None) -> Tensor | None:
    """Which queries see no key, [b or 1, 1, s, 1]: what the kernel gives for them is undefined."""
    return None if hidden is None else hidden.all(dim=-1, keepdim=True)


@register("attention_part", "npu_fusion_attention", devices=DEVICES, requires=REQUIRES, priority=1)
def npu_part(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shift: int,
    window_size: int | None,
    scale: float,
    hidden: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Out [s, b, n, e] and lse [s, b, n] in fp32, see `ops.attention_part.attention_part`."""
    if not fits(query, key, value):
        return part_by_rows(query, key, value, shift, window_size, scale, hidden)
    keys, blind = _visible_keys(query, key, shift, hidden), _blind(hidden)
    flat = (x.flatten(2) for x in (query, key[:keys], value[:keys]))
    order = _order(query, keys, shift, window_size, hidden, blind)
    out, maximum, total, *_ = torch.ops.npu.npu_fusion_attention(*flat, query.shape[2], "SBH", scale=scale, **order)
    lse = (maximum[..., 0] + total[..., 0].log()).permute(2, 0, 1)
    out = out.float().unflatten(2, (query.shape[2], -1))
    if blind is None:
        return out, lse
    rows = blind.permute(2, 0, 1, 3)  # [s, b or 1, 1, 1]
    return out.masked_fill(rows, 0.0), lse.masked_fill(rows.squeeze(-1), float("-inf"))


@register("attention_part_backward", "npu_fusion_attention_grad", devices=DEVICES, requires=REQUIRES, priority=1)
def npu_part_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    shift: int,
    window_size: int | None,
    scale: float,
    hidden: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """This part's share of the gradients in fp32, see `ops.attention_part.attention_part_backward`."""
    if not fits(query, key, value):
        return part_backward_by_rows(grad, query, key, value, out, lse, shift, window_size, scale, hidden)
    keys, blind = _visible_keys(query, key, shift, hidden), _blind(hidden)
    # exp(S - lse) is 0 for rows that see nothing, in this part or at all.
    unseen = lse == float("-inf")
    if blind is not None:
        unseen = unseen | blind.permute(2, 0, 1, 3).squeeze(-1)
    maximum = _statistic(lse.masked_fill(unseen, torch.finfo(torch.float32).max))
    flat = [x.flatten(2) for x in (query, key[:keys], value[:keys], grad.to(query.dtype))]
    gradients = torch.ops.npu.npu_fusion_attention_grad(
        *flat,
        query.shape[2],
        "SBH",
        softmax_max=maximum,
        softmax_sum=torch.ones_like(maximum),
        attention_in=out.to(query.dtype).flatten(2),
        scale_value=scale,
        **_order(query, keys, shift, window_size, hidden, blind),
    )[:3]
    grad_query, *others = (x.float().view(like.shape) for x, like in zip(gradients, (query, key[:keys], value[:keys])))
    behind = key.shape[0] - keys
    if behind:
        others = [torch.cat((x, x.new_zeros(behind, *x.shape[1:]))) for x in others]
    return grad_query, *others


# Stands for log 0 in statistics, of which the kernel takes differences: those of two infinities are undefined.
NOTHING = -1e30


@register("attention_merge", "npu_ring_attention_update", devices=DEVICES, requires=REQUIRES, priority=1)
def npu_merge(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """As `ops.attention_part.merge_part`: statistics (m, l) = (lse, 1) of both merge into (m, l), lse = m + log l."""
    if out.dtype != torch.float32 or out.numel() == 0:
        return merge_by_weights(out, lse, part_out, part_lse)
    maxima = [_statistic(x.clamp_min(NOTHING)) for x in (lse, part_lse)]
    one = torch.ones_like(maxima[0])
    merged, maximum, total = torch.ops.npu.npu_ring_attention_update(
        out.flatten(2), maxima[0], one, part_out.flatten(2), maxima[1], one, input_layout="SBH"
    )
    out.copy_(merged.view_as(out))
    log_sum = (maximum[..., 0] + total[..., 0].log()).permute(2, 0, 1)
    lse.copy_(log_sum.masked_fill(log_sum < NOTHING / 2, float("-inf")))


def _statistic(x: Tensor) -> Tensor:
    """[s, b, n] as the kernels store it, [b, n, s, 8]."""
    x = x.permute(1, 2, 0).unsqueeze(-1)
    return x.expand(*x.shape[:-1], COPIES).contiguous()
