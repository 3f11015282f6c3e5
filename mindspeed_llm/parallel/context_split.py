"""Which tokens of a sequence a context-parallel rank holds, and which of its queries see which keys. Free of torch.

The c ranks of a context-parallel group are a ring of c / u places with u neighbouring ranks each, which exchange heads
(u = 1: a ring alone; u = c: an exchange alone). Causal attention costs late tokens more than early ones, so a ring of
R places cuts the sequence into 2 R chunks and place i holds chunks i and 2 R - 1 - i: every place has the same work.
The u ranks of a place hold equal consecutive shares of its tokens.

Source: the balanced order of Megatron-LM's context parallelism; head exchange after DeepSpeed-Ulysses
(arXiv 2309.14509), both together after USP (arXiv 2405.07719).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

Range = tuple[int, int]


@dataclass(frozen=True)
class SequenceSplit:
    """How a sequence is shared.

    Args:
        ranks: context-parallel size c.
        ulysses: ranks u that exchange heads; it divides c.
    """

    ranks: int = 1
    ulysses: int = 1

    @property
    def ring(self) -> int:
        """Places of the ring."""
        return self.ranks // self.ulysses

    @property
    def multiple(self) -> int:
        """The length of a sequence must be a multiple of this."""
        return math.lcm(self.ranks, 2 * self.ring if self.ring > 1 else 1)

    def chunks(self, place: int, length: int) -> tuple[Range, ...]:
        """(start, stop) of the positions that a place of the ring holds, in order.

        Raises:
            ValueError: `length` is not a multiple of `multiple`.
        """
        if length % self.multiple:
            raise ValueError(
                f"{self.ranks} ranks share sequences of a multiple of {self.multiple}, not {length} tokens"
            )
        if self.ring == 1:
            return ((0, length),)
        size = length // (2 * self.ring)
        return tuple((number * size, (number + 1) * size) for number in (place, 2 * self.ring - 1 - place))

    def ranges(self, rank: int, length: int) -> tuple[Range, ...]:
        """(start, stop) of the positions that a rank of the context-parallel group holds, in order."""
        place, share = divmod(rank, self.ulysses)
        size = length // self.ranks
        skip, found = share * size, []
        for start, stop in self.chunks(place, length):
            first, last = start + max(skip, 0), min(stop, start + skip + size)
            if first < last:
                found.append((first, last))
            skip -= stop - start
        return tuple(found)


@dataclass(frozen=True)
class Part:
    """A rectangle of the score matrix: `rows` of the local queries, `columns` of the local keys that they see.

    `shift` is the position of the first query minus that of the first key. Every row sees a column.
    """

    rows: slice
    columns: slice
    shift: int


@lru_cache(maxsize=4096)
def parts(
    query_chunks: tuple[Range, ...], key_chunks: tuple[Range, ...], bounds: tuple[int, ...], window_size: int | None
) -> tuple[Part, ...]:
    """What has to be computed between the queries of one place and the keys of another.

    Args:
        query_chunks, key_chunks: from `SequenceSplit.chunks`; what a place holds lies in this order.
        bounds: starts of the documents and the total; a document sees itself only.
        window_size: of sliding-window attention, None without.

    Returns:
        Rectangles that cover every visible pair once. Parts of different documents or chunks share no row and column.
    """
    found = []
    for query_local, query_start, query_stop in _placed(query_chunks):
        for key_local, key_start, key_stop in _placed(key_chunks):
            for start, stop in zip(bounds, bounds[1:]):
                first_query, last_query = max(query_start, start), min(query_stop, stop)
                first_key, last_key = max(key_start, start), min(key_stop, last_query)
                if window_size is not None:
                    last_query = min(last_query, last_key + window_size - 1)
                    first_key = max(first_key, first_query - window_size + 1)
                first_query = max(first_query, first_key)
                if first_query >= last_query or first_key >= last_key:
                    continue
                rows = slice(query_local + first_query - query_start, query_local + last_query - query_start)
                columns = slice(key_local + first_key - key_start, key_local + last_key - key_start)
                found.append(Part(rows, columns, first_query - first_key))
    return tuple(found)


def rectangles(query_chunks: tuple[Range, ...], key_chunks: tuple[Range, ...]) -> Iterator[tuple[Part, Range, Range]]:
    """Every pair of chunks, with the positions of its queries and of its keys: what a mask decides about."""
    for query_local, query_start, query_stop in _placed(query_chunks):
        for key_local, key_start, key_stop in _placed(key_chunks):
            rows = slice(query_local, query_local + query_stop - query_start)
            columns = slice(key_local, key_local + key_stop - key_start)
            yield Part(rows, columns, 0), (query_start, query_stop), (key_start, key_stop)


def _placed(chunks: tuple[Range, ...]) -> Iterator[tuple[int, int, int]]:
    """(local index of the first token, start, stop) of each chunk."""
    local = 0
    for start, stop in chunks:
        yield local, start, stop
        local += stop - start
