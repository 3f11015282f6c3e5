"""Sets of moments as sorted lists of disjoint, half-open intervals (start, end) of integers."""

from __future__ import annotations

from collections.abc import Iterable

Intervals = list[tuple[int, int]]


def union(pieces: Iterable[tuple[int, int]]) -> Intervals:
    """Of pieces in any order, which may overlap, touch, lie in each other or be empty."""
    joined: Intervals = []
    for start, end in sorted(piece for piece in pieces if piece[0] < piece[1]):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((start, end))
    return joined


def intersection(a: Intervals, b: Intervals) -> Intervals:
    """What lies in both."""
    common, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < end:
            common.append((start, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return common


def difference(a: Intervals, b: Intervals) -> Intervals:
    """What lies in a and not in b."""
    left, j = [], 0
    for start, end in a:
        while j < len(b) and b[j][1] <= start:
            j += 1
        k = j
        while k < len(b) and b[k][0] < end:
            if start < b[k][0]:
                left.append((start, b[k][0]))
            start = max(start, b[k][1])
            k += 1
        if start < end:
            left.append((start, end))
    return left


def length(intervals: Intervals) -> int:
    """Total."""
    return sum(end - start for start, end in intervals)
