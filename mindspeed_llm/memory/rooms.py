"""Memory of a host store that is used again and again."""

from __future__ import annotations

import weakref
from typing import Any


class Rooms:
    """Rooms of a store that are used again and again: allocating them is slow, and steps repeat their sizes.

    A room is at most twice as large as what lies in it; sizes are rounded to quarters of powers of two, so that batches
    of varying length find each other's.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[Any]] = {}
        self.held = 0

    def take(self, nbytes: int) -> tuple[int, Any | None]:
        """Size of the room for `nbytes`, and a free one of at least that size if there is any."""
        size = rounded(nbytes)
        fitting = [s for s, rooms in self._free.items() if rooms and size <= s <= 2 * size]
        if not fitting:
            return size, None
        size = min(fitting)
        return size, self._free[size].pop()

    def lend(self, copy: object, size: int, room: Any, nbytes: int) -> None:
        """Count the room as used until `copy` is no more."""
        self.held += nbytes
        self._free.setdefault(size, [])  # here, since rooms come back at any time, during a look at all sizes too
        weakref.finalize(copy, self._give_back, size, room, nbytes).atexit = False

    def _give_back(self, size: int, room: Any, nbytes: int) -> None:
        self.held -= nbytes
        self._free[size].append(room)


def rounded(nbytes: int, smallest: int = 4096) -> int:
    """The next of the sizes 4, 5, 6, 7 times a power of two, at least a page, so that at most a fifth is unused."""
    step = 1 << max((nbytes - 1).bit_length() - 3, 0)
    return max(-(-nbytes // step) * step, smallest)
