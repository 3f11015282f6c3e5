"""Packing: which samples share a row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def pack(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[np.ndarray]:
    """Best-fit decreasing bin packing.

    Samples are taken from the longest to the shortest (ties in their given order) and each goes to the fullest row that
    still holds it. The rooms that exist are bits of one integer, so finding the smallest sufficient one does not
    depend on the number of rows: after the sort, time is linear in the samples. The result depends on lengths alone.

    Args:
        lengths: [n] tokens of each sample, all between 1 and `capacity`.
        capacity: tokens of a row.

    Returns:
        Per row the indices of its samples in their given order; rows ordered by their first sample.

    Raises:
        ValueError: a length is out of range.
    """
    lengths = np.asarray(lengths, np.int64)
    if len(lengths) and (lengths.min() < 1 or lengths.max() > capacity):
        raise ValueError(f"packing: lengths {lengths.min()}..{lengths.max()} must lie in 1..{capacity}")
    rows: list[list[int]] = []
    rows_with_room: dict[int, list[int]] = {}
    rooms = 0  # bit r is set when some row has room for r more tokens
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        left = room - length
        if left:
            rows_with_room.setdefault(left, []).append(row)
            rooms |= 1 << left
    return sorted((np.array(sorted(row), np.int64) for row in rows), key=lambda row: int(row[0]))
