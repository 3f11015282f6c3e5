"""Attention for training on a CPU: the score matrix in blocks of rows, each only as wide as causality lets it see.

For a block of queries i in [a, b) of one document, with key heads shared by r = n/g query heads each:

    S = scale Q_i K[:b]^T (fp32)   P = softmax(S)   O_i = P V[:b]
    dV[:b] += P^T dO_i   dP = dO_i V[:b]^T   dS = scale P (dP - sum(dP P))   dQ_i = dS K[:b]   dK[:b] += dS^T Q_i

All of these are batched products over the g key heads, which oneDNN runs near the speed of the linear layers, while
torch's flash backward on CPU reaches a fifth of it for documents of a hundred tokens. P is kept for the backward pass,
n / 2 numbers per pair of tokens, so longer documents than LONGEST_KEPT take the flash kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from mindspeed_llm.ops.attention import sdpa
from mindspeed_llm.ops.registry import register

# Tokens of a document up to which the weights are kept: at most as much memory as a handful of hidden states.
LONGEST_KEPT = 1024
# Queries per block: the scores of a block should lie in a core's cache, and its products still be large.
BLOCK_ROWS = 64
PRODUCT_DTYPES = (torch.bfloat16, torch.float32, torch.float64)


@register("attention", "blocks", devices=("cpu",), priority=1)
def block_attention(
    query: Tensor, key: Tensor, value: Tensor, window_size: int | None, dropout: float, scale: float | None
) -> Tensor:
    """As `ops.attention.sdpa`, which it calls where it has no form of its own.

    The same form with and without gradients: recomputation must repeat the forward pass bit by bit.
    """
    s = query.shape[0]
    windowed = window_size is not None and window_size < s
    square = key.shape[0] == s <= LONGEST_KEPT and query.dtype in PRODUCT_DTYPES
    if windowed or dropout or not square:
        return sdpa(query, key, value, window_size, dropout, scale)
    return _BlockAttention.apply(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale)


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        s, b, n, d = query.shape
        wide = torch.promote_types(query.dtype, torch.float32)
        g = key.shape[2]
        query, key, value = by_key_head(query, g), by_head(key), by_head(value)
        scaled_key = (key.to(wide) * scale).transpose(1, 2)
        out = query.new_empty(s, b, g, n // g, value.shape[-1])
        weights = []
        for start, stop in blocks_of(s):
            rows = query[:, start:stop].flatten(1, 2).to(wide)
            scores = torch.bmm(rows, scaled_key[..., :stop]).unflatten(1, (stop - start, -1))
            scores[..., start:].add_(_hidden(n // g, wide)[: stop - start, :, : stop - start])
            weights.append(scores.softmax(-1).to(value.dtype).flatten(1, 2))
            write_rows(out[start:stop], torch.bmm(weights[-1], value[:, :stop]))
        ctx.scale, ctx.sizes = scale, (s, b, n, d)
        ctx.save_for_backward(query, key, value, *weights)
        return out.view(s, b, -1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, *all_weights = ctx.saved_tensors
        s, b, n, d = ctx.sizes
        g = key.shape[0] // b
        grad = by_key_head(grad.reshape(s, b, n, value.shape[-1]), g)
        # Sums over blocks are kept wide.
        sum_dtype = torch.promote_types(key.dtype, torch.float32) if len(all_weights) > 1 else key.dtype
        grad_query = query.new_empty(s, b, g, n // g, d)
        grad_key, grad_value = (torch.zeros_like(x, dtype=sum_dtype) for x in (key, value))
        for (start, stop), weights in zip(blocks_of(s), all_weights):
            rows, grad_rows = query[:, start:stop].flatten(1, 2), grad[:, start:stop].flatten(1, 2)
            grad_weights = torch.bmm(grad_rows, value[:, :stop].transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype).mul_(ctx.scale)
            write_rows(grad_query[start:stop], torch.bmm(grad_scores, key[:, :stop]))
            grad_key[:, :stop] += torch.bmm(grad_scores.transpose(1, 2), rows)
            grad_value[:, :stop] += torch.bmm(weights.transpose(1, 2), grad_rows)
        grad_key, grad_value = (
            part.to(key.dtype).unflatten(0, (b, -1)).permute(2, 0, 1, 3) for part in (grad_key, grad_value)
        )
        return grad_query.view(s, b, n, d), grad_key, grad_value, None


def blocks_of(s: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of about equal blocks."""
    step = -(-s // max(1, round(s / BLOCK_ROWS)))
    return ((start, min(start + step, s)) for start in range(0, s, step))


@lru_cache(maxsize=8)
def _hidden(heads: int, dtype: torch.dtype) -> Tensor:
    """What hides later columns of a block, [rows, heads, rows]: -inf where a column is after its row, 0 elsewhere.

    A smaller block's is its corner. Adding it is a fifth of the work of filling where a boolean of [rows, 1, rows]
    says so.
    """
    rows = 2 * BLOCK_ROWS  # none is as long, see `blocks_of`
    later = torch.full((rows, rows), float("-inf"), dtype=dtype).triu_(1)
    return later[:, None, :].expand(rows, heads, rows).contiguous()


def by_head(x: Tensor) -> Tensor:
    """[s, b, g, d] -> contiguous [b g, s, d]: the heads as a batch of products."""
    return x.permute(1, 2, 0, 3).flatten(0, 1).contiguous()


def by_key_head(x: Tensor, num_groups: int) -> Tensor:
    """[s, b, g r, d] -> contiguous [b g, s, r, d]."""
    return x.unflatten(2, (num_groups, -1)).permute(1, 2, 0, 3, 4).flatten(0, 1).contiguous()


def write_rows(rows: Tensor, product: Tensor) -> None:
    """Put a block's product [b g, s r, d] into its place, rows [s, b, g, r, d]."""
    s, b, g, r, d = rows.shape
    rows.permute(1, 2, 0, 3, 4).copy_(product.view(b, g, s, r, d))
