"""Attention of some queries to some keys, a part of a whole that is put together elsewhere (context parallelism).

Query i of a part sees key j where i + shift - window < j <= i + shift: shift is how far the first query lies behind
the first key in the sequence; a mask may take the place of this order. With S = scale Q K^T over visible pairs only:

    lse_i = log sum_j exp(S_ij)      out_i = sum_j exp(S_ij - lse_i) v_j

Parts over disjoint keys merge into the attention over all of them: with L = log(exp(lse) + exp(lse')),
out = exp(lse - L) out + exp(lse' - L) out'. From the merged out and L the gradients of a part need no other part:

    P_ij = exp(S_ij - L_i)   dV = P^T dO   dS = scale P (dO V^T - sum(dO out))   dQ = dS K   dK = dS^T Q

Source: online softmax (Milakov and Gimelshein, arXiv 1805.02867), FlashAttention (Dao et al., arXiv 2205.14135).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mindspeed_llm.ops.attention_blocks import blocks_of, by_head, by_key_head, write_rows
from mindspeed_llm.ops.registry import REFERENCE, implementation, register


def attention_part(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    shift: int,
    window_size: int | None,
    scale: float,
    hidden: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Out and log-sum-exp of one part.

    Args:
        query: [s, b, n, d]; key: [s_k, b, g, d], value: [s_k, b, g, e], n a multiple of g.
        shift: position of the first query minus position of the first key, >= 0.
        window_size: a token sees itself and the window_size - 1 tokens before; None for all before.
        scale: multiplies the scores.
        hidden: bool [b or 1, 1, s, s_k], True where a query does not see a key; shift and window_size say nothing then.

    Without a mask every query must see at least one of the keys.

    Returns:
        out [s, b, n, e] and lse [s, b, n], in fp32 (fp64 for fp64 input); 0 and -inf for a query that sees no key.
    """
    return implementation("attention_part")(query, key, value, shift, window_size, scale, hidden)


def attention_part_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    shift: int,
    window_size: int | None,
    scale: float,
    hidden: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """This part's share of the gradients.

    Args:
        grad, out: [s, b, n, e], gradient and value of the merged output for these queries.
        lse: [s, b, n], log-sum-exp over all the keys they see, in this part and the others.
        query, key, value, shift, window_size, scale, hidden: as in the forward pass.

    Returns:
        Of query, key and value, in fp32 (fp64 for fp64 input).
    """
    run = implementation("attention_part_backward")
    return run(grad, query, key, value, out, lse, shift, window_size, scale, hidden)


def merge_part(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """Merge a part into `out` [s, b, n, e] and `lse` [s, b, n] in place; before the first part lse is -inf."""
    implementation("attention_merge")(out, lse, part_out, part_lse)


@register("attention_merge", REFERENCE, priority=-1)
def merge_reference(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """The formula."""
    weights = torch.stack((lse, part_lse)).nan_to_num(neginf=torch.finfo(lse.dtype).min).softmax(0).unsqueeze(-1)
    out.copy_(weights[0] * out + weights[1] * part_out)
    lse.copy_(torch.logaddexp(lse, part_lse))


@register("attention_merge", "torch")
def merge_by_weights(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """In place, with one pass over `out`."""
    merged = torch.logaddexp(lse, part_lse)
    total = _finite(merged)
    out.mul_((lse - total).exp_().unsqueeze(-1)).addcmul_(part_out, (part_lse - total).exp_().unsqueeze(-1))
    lse.copy_(merged)


@register("attention_part", REFERENCE, priority=-1)
def part_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shift: int,
    window_size: int | None,
    scale: float,
    hidden: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The formula with every score in memory."""
    scores, _, value = _all_scores(query, key, value, shift, window_size, scale, hidden)
    lse = scores.logsumexp(-1)
    out = torch.einsum("bnst,tbne->sbne", (scores - _finite(lse).unsqueeze(-1)).exp(), value)
    return out, lse.permute(2, 0, 1)


@register("attention_part_backward", REFERENCE, priority=-1)
def part_backward_reference(
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
    """The formula with every score in memory."""
    groups, wide = key.shape[2], _wide(query)
    grad, out, lse = grad.to(wide), out.to(wide), lse.to(wide)
    scores, keys, values = _all_scores(query, key, value, shift, window_size, scale, hidden)
    weights = (scores - _finite(lse).permute(1, 2, 0).unsqueeze(-1)).exp()
    minus = (grad * out).sum(-1).permute(1, 2, 0).unsqueeze(-1)
    grad_scores = scale * weights * (torch.einsum("sbne,tbne->bnst", grad, values) - minus)
    grad_query = torch.einsum("bnst,tbnd->sbnd", grad_scores, keys)
    by_query_head = (
        torch.einsum("bnst,sbnd->tbnd", grad_scores, query.to(wide)),
        torch.einsum("bnst,sbne->tbne", weights, grad),
    )
    return grad_query, *(x.unflatten(2, (groups, -1)).sum(3) for x in by_query_head)


def _all_scores(
    query: Tensor, key: Tensor, value: Tensor, shift: int, window_size: int | None, scale: float, hidden: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [b, n, s, s_k], -inf where not seen; keys and values repeated for every query head, wide."""
    repeats, wide = query.shape[2] // key.shape[2], _wide(query)
    key, value = (x.to(wide).repeat_interleave(repeats, dim=2) for x in (key, value))
    scores = torch.einsum("sbnd,tbnd->bnst", query.to(wide), key) * scale
    if hidden is None:
        position = torch.arange(shift, shift + query.shape[0], device=query.device)[:, None]
        column = torch.arange(key.shape[0], device=query.device)
        hidden = column > position
        if window_size is not None:
            hidden = hidden | (column <= position - window_size)
    return scores.masked_fill(hidden, float("-inf")), key, value


@register("attention_part", "rows")
def part_by_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shift: int,
    window_size: int | None,
    scale: float,
    hidden: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The formula over blocks of rows, computed in fp32 at least; scores may be capped (ops.attention)."""
    s, b, n, _ = query.shape
    g, wide = key.shape[2], _wide(query)
    rows_of, key, value = by_key_head(query.to(wide), g), by_head(key.to(wide)), by_head(value.to(wide))
    out = key.new_empty(s, b, g, n // g, value.shape[-1])
    lse = key.new_empty(s, b, g, n // g, 1)
    for start, stop, first, last in _visible_blocks(s, key.shape[1], shift, window_size, hidden):
        rows = rows_of[:, start:stop].flatten(1, 2)
        unseen = _hidden(hidden, start, stop, first, last, shift, window_size, key)
        scores = _scores(rows, key[:, first:last], unseen, scale, softcap)
        row_lse = scores.logsumexp(-1, keepdim=True)
        write_rows(lse[start:stop], row_lse)
        write_rows(out[start:stop], torch.bmm(scores.sub_(_finite(row_lse)).exp_(), value[:, first:last]))
    return out.view(s, b, n, -1), lse.view(s, b, n)


@register("attention_part_backward", "rows")
def part_backward_by_rows(
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
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The formula over blocks of rows; the weights are computed again from the scores."""
    s, b, n, d = query.shape
    g, wide = key.shape[2], _wide(query)
    grad, out, lse = grad.to(wide), out.to(wide), lse.to(wide)
    minus = by_key_head((grad * out).sum(-1, keepdim=True), g)
    lse = by_key_head(_finite(lse).unsqueeze(-1), g)
    grad, query = by_key_head(grad, g), by_key_head(query.to(wide), g)
    key, value = by_head(key.to(wide)), by_head(value.to(wide))
    grad_query = key.new_empty(s, b, g, n // g, d)
    grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
    for start, stop, first, last in _visible_blocks(s, key.shape[1], shift, window_size, hidden):
        rows, grad_rows, row_lse, row_minus = (x[:, start:stop].flatten(1, 2) for x in (query, grad, lse, minus))
        columns = slice(first, last)
        unseen = _hidden(hidden, start, stop, first, last, shift, window_size, key)
        scores = _scores(rows, key[:, columns], unseen, scale, softcap)
        slope = None if softcap is None else _slope(scores, softcap)
        weights = scores.sub_(row_lse).exp_()
        grad_value[:, columns] += torch.bmm(weights.transpose(1, 2), grad_rows)
        grad_scores = torch.bmm(grad_rows, value[:, columns].transpose(1, 2)).sub_(row_minus).mul_(weights).mul_(scale)
        if slope is not None:
            grad_scores.mul_(slope)
        write_rows(grad_query[start:stop], torch.bmm(grad_scores, key[:, columns]))
        grad_key[:, columns] += torch.bmm(grad_scores.transpose(1, 2), rows)
    grad_key, grad_value = (x.unflatten(0, (b, g)).permute(2, 0, 1, 3) for x in (grad_key, grad_value))
    return grad_query.view(s, b, n, d), grad_key, grad_value


def _visible_blocks(
    s: int, s_k: int, shift: int, window_size: int | None, hidden: Tensor | None
) -> Iterator[tuple[int, int, int, int]]:
    """(start, stop) of blocks of queries, and (first, last) of the keys that any of them may see."""
    for start, stop in blocks_of(s):
        if hidden is not None:
            yield start, stop, 0, s_k
            continue
        first = 0 if window_size is None else max(0, start + shift - window_size + 1)
        yield start, stop, first, min(s_k, stop + shift)


def _hidden(
    mask: Tensor | None, start: int, stop: int, first: int, last: int, shift: int, window_size: int | None, key: Tensor
) -> Tensor | None:
    """Which keys [first, last) the queries [start, stop) do not see, [b or 1, queries, keys]; None when all see all."""
    if mask is not None:
        return mask[:, 0, start:stop, first:last]
    sees_last = last - 1 <= start + shift
    if sees_last and (window_size is None or stop - 1 + shift - first < window_size):
        return None
    position = torch.arange(start + shift, stop + shift, device=key.device)[:, None]
    column = torch.arange(first, last, device=key.device)
    unseen = column > position
    if window_size is not None:
        unseen |= column <= position - window_size
    return unseen[None]


def _slope(capped: Tensor, softcap: float) -> Tensor:
    """Derivative of softcap tanh(S / softcap) by S, from its value; 0 where a key is not seen."""
    return capped.masked_fill(capped == float("-inf"), softcap).div_(softcap).square_().neg_().add_(1)


def _scores(rows: Tensor, key: Tensor, unseen: Tensor | None, scale: float, softcap: float | None = None) -> Tensor:
    """Scores [b g, s r, s_k] of a block's queries [b g, s r, d], -inf where a key is not seen."""
    scores = torch.bmm(rows, key.transpose(1, 2)).mul_(scale)
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    if unseen is not None:
        batch, s, _ = unseen.shape
        scores.unflatten(0, (batch, -1)).unflatten(2, (s, -1)).masked_fill_(unseen[:, None, :, None], float("-inf"))
    return scores


def _finite(lse: Tensor) -> Tensor:
    """lse, 0 where nothing was seen: the weights exp(-inf - 0) are 0 then, and not undefined."""
    return lse.masked_fill(lse == float("-inf"), 0.0)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
