"""Attention by `npu_fusion_attention`: one kernel each way, one call for all documents of a packed row."""

from __future__ import annotations

import torch
from torch import Tensor

from mindspeed_llm.ops.attention import all_scores, by_document
from mindspeed_llm.ops.attention_masked import masked_scores
from mindspeed_llm.ops.npu.kernels import DEVICES, FLOATS, REQUIRES
from mindspeed_llm.ops.npu.visibility import seen_in_order, whole
from mindspeed_llm.ops.registry import register

# Limits of the kernel.
LARGEST_HEAD = 768
MOST_HEADS = 256
MOST_DOCUMENTS = 1024


def fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernel takes tensors [..., heads, channels] of this type and these sizes."""
    n, d = query.shape[-2:]
    sizes = n <= MOST_HEADS and value.shape[-1] <= d <= LARGEST_HEAD
    return sizes and query.dtype in FLOATS and query.dtype == key.dtype == value.dtype and query.numel() > 0


def softmax_scale(query: Tensor, scale: float | None) -> float:
    """What multiplies the scores: `scale`, or 1 / sqrt(d) where there is none."""
    return query.shape[-1] ** -0.5 if scale is None else scale


@register("attention", "npu_fusion_attention", devices=DEVICES, requires=REQUIRES, priority=1)
def npu_attention(
    query: Tensor, key: Tensor, value: Tensor, window_size: int | None, dropout: float, scale: float | None
) -> Tensor:
    """Causal attention of SBHD tensors, see `ops.attention.attention`."""
    if not fits(query, key, value):
        return all_scores(query, key, value, window_size, dropout, scale)
    s, s_k = query.shape[0], key.shape[0]
    order = seen_in_order(s, s_k, s_k - s, window_size, query.device)
    return fused(query, key, value, softmax_scale(query, scale), dropout, order)


def fused(query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float, order: dict) -> Tensor:
    """[s, b, n, d], [s_k, b, g, d], [s_k, b, g, e] -> [s, b, n e]."""
    flat = (x.flatten(2) for x in (query, key, value))
    return torch.ops.npu.npu_fusion_attention(
        *flat, query.shape[2], "SBH", scale=scale, keep_prob=1.0 - dropout, **order
    )[0]


@register("packed_attention", "npu_fusion_attention", devices=DEVICES, requires=REQUIRES, priority=1)
def npu_packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: list[int],
    window_size: int | None,
    dropout: float,
    scale: float | None,
) -> Tensor:
    """All documents in one call, in the layout TND; more than the kernel takes at once in several."""
    if not fits(query, key, value):
        return by_document(query, key, value, lengths, window_size, dropout, scale)
    parts = [lengths[start : start + MOST_DOCUMENTS] for start in range(0, len(lengths), MOST_DOCUMENTS)]
    tokens = [sum(part) for part in parts]
    outs = []
    for part, q, k, v in zip(parts, query.split(tokens), key.split(tokens), value.split(tokens)):
        ends = torch.tensor(part).cumsum(0).tolist()
        longest = max(part)
        order = seen_in_order(longest, longest, 0, window_size, query.device)
        out = torch.ops.npu.npu_fusion_attention(
            *(x.squeeze(1) for x in (q, k, v)),
            query.shape[2],
            "TND",
            scale=softmax_scale(query, scale),
            keep_prob=1.0 - dropout,
            actual_seq_qlen=ends,
            actual_seq_kvlen=ends,
            **order,
        )[0]
        outs.append(out.flatten(1).unsqueeze(1))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


@register("masked_attention", "npu_fusion_attention", devices=DEVICES, requires=REQUIRES, priority=1)
def npu_masked_attention(
    query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, dropout: float, scale: float | None
) -> Tensor:
    """Attention under a mask of any form, see `ops.attention_masked.masked_attention`."""
    if not fits(query, key, value):
        return masked_scores(query, key, value, hidden, dropout, scale)
    # What the kernel gives a query that sees nothing is undefined: let it see all and clear the result.
    blind = hidden.all(dim=-1, keepdim=True)
    out = fused(query, key, value, softmax_scale(query, scale), dropout, whole(hidden & ~blind))
    return out.masked_fill(blind.permute(2, 0, 1, 3).flatten(2), 0.0)
