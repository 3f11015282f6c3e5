"""Attention over a sequence that lies around a ring of ranks: keys and values travel, queries stay.

Every rank computes its queries against the keys and values at hand while the next ones are under way, and merges the
results. In the backward pass they travel once more, and the sums of their gradients follow one step behind, adding up
what every rank finds, until they are home.

A ring of R ranks may be a double ring: R / w inner rings of w neighbours. Keys and values go around the inner ring
while those of the next inner ring are on the way for w steps, which suits few slow links between groups of fast ones.

Source: Ring Attention (Liu et al., arXiv 2310.01889); double ring: LoongTrain (arXiv 2406.18485).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_llm.ops.attention_part import attention_part, attention_part_backward, merge_part
from mindspeed_llm.parallel.context_split import Part, SequenceSplit, parts, rectangles

# One tag for each kind of message that can be under way between the same two ranks at the same time.
OUTER, INNER, OUTER_SUMS, INNER_SUMS = range(4)


@dataclass(frozen=True)
class Transfer:
    """Tensors on their way; `wait` gives those that arrive."""

    arriving: list[Tensor]
    leaving: Sequence[Tensor]
    works: list[Any]

    def wait(self) -> list[Tensor]:
        """Block until they are here (and ours are gone)."""
        for work in self.works:
            work.wait()
        return self.arriving


@dataclass(frozen=True)
class Circle:
    """Neighbours on one ring, as global ranks; both None on a ring of one."""

    group: dist.ProcessGroup
    size: int
    following: int | None
    previous: int | None

    def pass_on(self, tensors: Sequence[Tensor], tag: int) -> Transfer:
        """Start sending to the following rank and receiving the like from the previous one."""
        if self.size == 1:
            return Transfer(list(tensors), (), [])
        leaving = [tensor.contiguous() for tensor in tensors]
        arriving = [torch.empty_like(tensor) for tensor in leaving]
        messages = [dist.P2POp(dist.isend, x, self.following, self.group, tag) for x in leaving]
        messages += [dist.P2POp(dist.irecv, x, self.previous, self.group, tag) for x in arriving]
        return Transfer(arriving, leaving, dist.batch_isend_irecv(messages))


class Ring:
    """A rank's place on the ring of its context-parallel group.

    Args:
        group: the context-parallel group.
        split: how it shares sequences.
        window: ranks of an inner ring, a divisor of the ring; 1 or the whole ring for a single ring.
    """

    def __init__(self, group: dist.ProcessGroup, split: SequenceSplit, window: int = 1):
        self.split = split
        self.place, share = divmod(group.rank(), split.ulysses)
        self.outer_place, self.inner_place = divmod(self.place, window)
        self.outer_size, self.inner_size = split.ring // window, window

        def rank_at(outer: int, inner: int) -> int:
            place = outer % self.outer_size * window + inner % window
            return dist.get_global_rank(group, place * split.ulysses + share)

        o, i = self.outer_place, self.inner_place
        self.outer = Circle(group, self.outer_size, rank_at(o + 1, i), rank_at(o - 1, i))
        self.inner = Circle(group, self.inner_size, rank_at(o, i + 1), rank_at(o, i - 1))

    def source(self, outer_step: int, inner_step: int) -> int:
        """The place whose keys and values are here at a step."""
        inner = (self.inner_place - inner_step) % self.inner_size
        return (self.outer_place - outer_step) % self.outer_size * self.inner_size + inner

    def visits(self, tensors: Sequence[Tensor]) -> Iterator[tuple[int, int, Sequence[Tensor]]]:
        """(outer step, inner step, tensors of that step's source), own tensors first; the next are under way."""
        for outer_step in range(self.outer_size):
            outer_next = self.outer.pass_on(tensors, OUTER) if outer_step + 1 < self.outer_size else None
            visiting = tensors
            for inner_step in range(self.inner_size):
                inner_next = self.inner.pass_on(visiting, INNER) if inner_step + 1 < self.inner_size else None
                yield outer_step, inner_step, visiting
                visiting = inner_next.wait() if inner_next else visiting
            tensors = outer_next.wait() if outer_next else tensors


@dataclass(frozen=True)
class RingProblem:
    """What stays the same between forward and backward pass.

    Attributes:
        bounds: starts of the documents and the total, over the whole sequence.
        window_size, scale: as in ops.attention.
        hidden: mask over the whole sequence in place of causal order, documents and window, as in ops.attention_masked.
    """

    ring: Ring
    bounds: tuple[int, ...]
    window_size: int | None
    scale: float
    hidden: Tensor | None = None

    def parts(self, source: int) -> list[tuple[Part, Tensor | None]]:
        """What this rank computes with the keys of another place, each with its piece of the mask."""
        split, length = self.ring.split, self.bounds[-1]
        own, other = split.chunks(self.ring.place, length), split.chunks(source, length)
        if self.hidden is None:
            return [(part, None) for part in parts(own, other, self.bounds, self.window_size)]
        return [
            (part, self.hidden[:, :, slice(*queries), slice(*keys)]) for part, queries, keys in rectangles(own, other)
        ]


def ring_attention(query: Tensor, key: Tensor, value: Tensor, problem: RingProblem) -> Tensor:
    """Attention of this place's queries to the keys of all places, causal or under the problem's mask.

    Args:
        query: [s, b, n, d] of the tokens in `SequenceSplit.chunks`; key [s, b, g, d], value [s, b, g, e].

    Returns:
        [s, b, n * e].
    """
    return _RingAttention.apply(query, key, value, problem).flatten(2)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, problem: RingProblem) -> Tensor:
        ring = problem.ring
        wide = torch.promote_types(query.dtype, torch.float32)
        out = query.new_zeros(*query.shape[:3], value.shape[-1], dtype=wide)
        lse = query.new_full(query.shape[:3], float("-inf"), dtype=wide)
        for outer_step, inner_step, (k, v) in ring.visits((key, value)):
            for part, hidden in problem.parts(ring.source(outer_step, inner_step)):
                found = attention_part(
                    query[part.rows],
                    k[part.columns],
                    v[part.columns],
                    shift=part.shift,
                    window_size=problem.window_size,
                    scale=problem.scale,
                    hidden=hidden,
                )
                merge_part(out[part.rows], lse[part.rows], *found)
        ctx.problem = problem
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, out, lse = ctx.saved_tensors
        problem, ring = ctx.problem, ctx.problem.ring
        grad_query = torch.zeros_like(query, dtype=lse.dtype)
        inner_sums = outer_sums = None
        for outer_step, inner_step, (k, v) in ring.visits((key, value)):
            found = [torch.zeros_like(x, dtype=lse.dtype) for x in (k, v)]
            for part, hidden in problem.parts(ring.source(outer_step, inner_step)):
                _add_part(problem, part, hidden, grad, query, k, v, out, lse, grad_query, *found)
            if inner_step:
                _add(found, inner_sums.wait())
            inner_sums = ring.inner.pass_on(found, INNER_SUMS)
            if inner_step + 1 == ring.inner_size:
                # Once around the inner ring, the sums are back with the rank that got this step's keys from outside.
                found = inner_sums.wait()
                if outer_step:
                    _add(found, outer_sums.wait())
                outer_sums = ring.outer.pass_on(found, OUTER_SUMS)
        grad_key, grad_value = outer_sums.wait()
        return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype), None


def _add_part(problem, part, hidden, grad, query, key, value, out, lse, grad_query, grad_key, grad_value) -> None:
    """Add one part's share to the gradients of the local queries and the visiting keys and values."""
    rows, columns = part.rows, part.columns
    of_query, of_key, of_value = attention_part_backward(
        grad[rows],
        query[rows],
        key[columns],
        value[columns],
        out[rows],
        lse[rows],
        shift=part.shift,
        window_size=problem.window_size,
        scale=problem.scale,
        hidden=hidden,
    )
    grad_query[rows] += of_query
    grad_key[columns] += of_key
    grad_value[columns] += of_value


def _add(sums: list[Tensor], more: list[Tensor]) -> None:
    for total, term in zip(sums, more):
        total += term
