"""Causal softmax attention without an explicit mask: softmax(q k^T / sqrt(d)) v, each token seeing itself and before.

Layouts (s sequence, b batch, n query heads, g key/value heads, d head dim, t packed tokens):
  SBHD  q [s, b, n, d], k [s_k, b, g, d], v [s_k, b, g, e]; s_k >= s, the queries being the last s of the s_k positions
  THD   q [t, 1, n, d], k [t, 1, g, d], v [t, 1, g, e] with cu_seqlens [documents + 1]: one document after the other
e is d but for multi-head latent attention.
A document is computed by itself, from its own rows only, so no value of another document can reach it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mindspeed_llm.ops.registry import REFERENCE, implementation, register


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    window_size: int | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Causal attention of SBHD tensors, or of packed documents when `cu_seqlens` is given.

    Args:
        query: [s, b, n, d]; key: [s_k, b, g, d], value: [s_k, b, g, e] with n a multiple of g.
        cu_seqlens: integer [documents + 1], starts of the documents and the total; s must be the total and b 1.
        window_size: a token sees itself and the window_size - 1 tokens before; None for all before.
        dropout: probability of dropping an attention weight (0 outside training).
        scale: multiplies the scores; default 1 / sqrt(d).

    Returns:
        [s, b, n * e].
    """
    if cu_seqlens is None:
        return implementation("attention")(query, key, value, window_size, dropout, scale)
    if query.shape[1] != 1:
        raise ValueError(f"packed attention takes a batch of 1, not {query.shape[1]}")
    lengths = cu_seqlens.diff().tolist()
    if sum(lengths) != query.shape[0] or query.shape[0] != key.shape[0]:
        raise ValueError(f"cu_seqlens ends at {sum(lengths)}, the packed row has {query.shape[0]} tokens")
    lengths = [length for length in lengths if length]
    return implementation("packed_attention")(query, key, value, lengths, window_size, dropout, scale)


@register("packed_attention", REFERENCE)
def by_document(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: list[int],
    window_size: int | None,
    dropout: float,
    scale: float | None,
) -> Tensor:
    """A call of the operator `attention` for each document; `lengths` are theirs, none of them 0."""
    run = implementation("attention")
    # split's backward is one concatenation; slicing would write a zero-filled row for every document.
    documents = zip(query.split(lengths), key.split(lengths), value.split(lengths))
    return torch.cat([run(q, k, v, window_size, dropout, scale) for q, k, v in documents])


@register("attention", "sdpa")
def sdpa(
    query: Tensor, key: Tensor, value: Tensor, window_size: int | None, dropout: float, scale: float | None
) -> Tensor:
    """torch's fused attention; a mask is built only for a window shorter than the sequence or queries after a cache."""
    s, b, n, _ = query.shape
    s_k, g = key.shape[0], key.shape[2]
    mask = None
    if (window_size is not None and s_k > window_size) or (s_k != s and s != 1):
        mask = visible(s, s_k, window_size, query.device)
    context = F.scaled_dot_product_attention(
        query.permute(1, 2, 0, 3),
        key.permute(1, 2, 0, 3),
        value.permute(1, 2, 0, 3),
        attn_mask=mask,
        is_causal=mask is None and s > 1,
        dropout_p=dropout,
        scale=scale,
        enable_gqa=g != n,
    )
    return context.permute(2, 0, 1, 3).reshape(s, b, -1)


def visible(s: int, s_k: int, window_size: int | None, device: torch.device) -> Tensor:
    """Boolean [s, s_k]: which of the s_k positions each of the last s may see."""
    query_position = torch.arange(s_k - s, s_k, device=device)[:, None]
    key_position = torch.arange(s_k, device=device)[None, :]
    seen = key_position <= query_position
    return seen if window_size is None else seen & (key_position > query_position - window_size)


@register("attention", REFERENCE, priority=-1)
def all_scores(
    query: Tensor, key: Tensor, value: Tensor, window_size: int | None, dropout: float, scale: float | None
) -> Tensor:
    """The formula with every score in memory, differentiated by autograd."""
    return reference(query, key, value, window_size=window_size, dropout=dropout, scale=scale)


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    window_size: int | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """The formula, with one mask that also separates the documents; softmax in fp32 at least."""
    s, b, n, d = query.shape
    s_k, repeats = key.shape[0], n // key.shape[2]
    key, value = key.repeat_interleave(repeats, dim=2), value.repeat_interleave(repeats, dim=2)
    scores = torch.einsum("sbnd,tbnd->bnst", query, key) * (d**-0.5 if scale is None else scale)
    seen = visible(s, s_k, window_size, query.device)
    if cu_seqlens is not None:
        document = torch.bucketize(torch.arange(s_k, device=query.device), cu_seqlens[1:], right=True)
        seen = seen & (document[-s:, None] == document[None, :])
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1, dtype=wide).to(query.dtype)
    weights = F.dropout(weights, dropout)
    return torch.einsum("bnst,tbne->sbne", weights, value).reshape(s, b, -1)
