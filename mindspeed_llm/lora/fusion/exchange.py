"""What every rank of a group sends to every other, where that is cheaper than the back end's own collective.

gloo gathers in rings of two messages, and its reduce-scatter sends twice what is needed. Both are the same exchange:
one message from each rank to each other. It is an all-to-all, which is gloo's quickest collective for small messages.

Where they are large, each is sent by itself, and the receiving end is made first. gloo sends when the other side has
said that it will receive; its all-to-all sends before it says so, on one and the same socket. Whichever rank is late
then says so behind its own data, the other begins to send when these have left, and the link is used one way at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Back ends whose collectives are replaced by an exchange.
BACKENDS = ("gloo",)

# Bytes of a message from which on it is sent by itself: less passes in the time that the ends need to agree.
LARGE = 1 << 17


def replaces_collectives(group: Any) -> bool:
    """Whether this group's gathers and scatters are exchanges."""
    return dist.get_backend(group) in BACKENDS


class Exchange:
    """A message of `numbers` numbers from every rank to every other.

    All ranks of the group make and start theirs in one and the same order: ends that are made first meet what is sent
    first.

    Attributes:
        received: [t - 1, numbers], in the order of the ranks, this one left out; filled when `wait` returns.
    """

    def __init__(self, numbers: int, like: Tensor, group: Any) -> None:
        me = group.rank()
        self.group, self.others = group, [rank for rank in range(group.size()) if rank != me]
        self.received = torch.empty(len(self.others), numbers, dtype=like.dtype, device=like.device)
        self.works: list[Any] = []
        if self.is_large:
            self.works = [dist.irecv(row, group=group, group_src=rank) for row, rank in zip(self.received, self.others)]

    @property
    def is_large(self) -> bool:
        """Whether each message is sent by itself, and can wait its turn behind others on the way."""
        return self.received[0].nbytes >= LARGE

    def start(self, sent: Tensor) -> None:
        """Send, to each of `others` its row.

        Args:
            sent: [t - 1, numbers], or [1, numbers] for all of them; held until `wait` returns.
        """
        rows = sent.contiguous().expand_as(self.received)
        if self.is_large:
            self.works += [dist.isend(row, group=self.group, group_dst=rank) for row, rank in zip(rows, self.others)]
            return
        sizes = [rows.shape[1]] * self.group.size()
        sizes[self.group.rank()] = 0
        arriving, leaving = self.received.view(-1), rows.reshape(-1)
        self.works = [dist.all_to_all_single(arriving, leaving, sizes, sizes, group=self.group, async_op=True)]

    def wait(self) -> None:
        """Until everything has arrived, and what was sent may be written to."""
        for work in self.works:
            work.wait()
