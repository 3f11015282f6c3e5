"""Packed documents on a CPU: those of about one length as a batch, so that short ones are not a call each.

A document is filled up to the length of its batch with copies of its own last token. Causal order hides these from its
tokens, and nothing arrives for them in the backward pass, so they change nothing; no row of another document is read.
What a document is filled up to depends on its own length alone, so its result does not depend on its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mindspeed_llm.ops.attention import able
from mindspeed_llm.ops.registry import register

# Documents are filled up to a multiple of this many tokens, or of an eighth of their power of two where that is more.
SMALLEST_STEP = 16
# A longer document has enough to compute to be a call by itself.
LONGEST_FILLED = 256


@dataclass(frozen=True)
class Batches:
    """How the rows of packed documents are arranged for attention.

    Attributes:
        sizes: (length s, documents b) of each batch; its rows are [s, b] in `order`.
        order: the packed row of each arranged row.
        filling: which arranged rows are copies.
        back: the arranged row of each packed row.
    """

    sizes: tuple[tuple[int, int], ...]
    order: Tensor
    filling: Tensor
    back: Tensor


def filled_length(length: int) -> int:
    """Tokens that a document is filled up to; long ones stay as they are."""
    if length > LONGEST_FILLED:
        return length
    step = max(SMALLEST_STEP, 2 ** (length - 1).bit_length() // 8)
    return -(-length // step) * step


@lru_cache(maxsize=16)
def arrange(lengths: tuple[int, ...]) -> Batches:
    """Batches of packed documents of these lengths; every layer asks for the same."""
    starts = torch.tensor((0, *lengths)).cumsum(0).tolist()
    by_length: dict[int, list[int]] = {}
    for number, length in enumerate(lengths):
        by_length.setdefault(filled_length(length), []).append(number)
    order, real, sizes = [], [], []
    for filled, numbers in by_length.items():
        position = torch.arange(filled)[:, None]
        own = torch.tensor([lengths[number] for number in numbers])
        first = torch.tensor([starts[number] for number in numbers])
        order.append((first + torch.minimum(position, own - 1)).flatten())
        real.append((position < own).flatten())
        sizes.append((filled, len(numbers)))
    rows, is_real = torch.cat(order), torch.cat(real)
    back = torch.empty(starts[-1], dtype=torch.long)
    back[rows[is_real]] = is_real.nonzero().squeeze(1)
    return Batches(tuple(sizes), rows, (~is_real).nonzero().squeeze(1), back)


class _Take(torch.autograd.Function):
    """Rows of x [t, ...]: forward those of `rows`, backward of the gradient those of `back`, zero at `unread`."""

    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor, back: Tensor, unread: Tensor | None) -> Tensor:
        ctx.back, ctx.unread = back, unread
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        taken = grad.index_select(0, ctx.back)
        return taken if ctx.unread is None else taken.index_fill_(0, ctx.unread, 0), None, None, None


@register("packed_attention", "by_length", devices=("cpu",), priority=1)
def by_length(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: list[int],
    window_size: int | None,
    dropout: float,
    scale: float | None,
) -> Tensor:
    """A call of the operator `attention` for each batch; `lengths` are the documents', none of them 0."""
    if not lengths:
        return query.new_zeros(0, 1, query.shape[2] * value.shape[3])
    run = able(dropout)
    if len(lengths) == 1 and filled_length(lengths[0]) == lengths[0]:
        return run(query, key, value, window_size, dropout, scale)
    batches = arrange(tuple(lengths))
    parts = [_Take.apply(x.squeeze(1), batches.order, batches.back, None) for x in (query, key, value)]
    cut = [s * b for s, b in batches.sizes]
    outs = []
    for size, *own in zip(batches.sizes, *(part.split(cut) for part in parts)):
        own_query, own_key, own_value = (x.unflatten(0, size) for x in own)
        outs.append(run(own_query, own_key, own_value, window_size, dropout, scale).flatten(0, 1))
    return _Take.apply(torch.cat(outs), batches.back, batches.order, batches.filling).unsqueeze(1)
