"""All-to-all of rows that travel while something else is computed, forward and backward.

    journey = depart(rows, send, receive, group)     the rows leave
    ...                                              what is computed here hides the way there
    arrived = journey.arrive()                       they are needed

Autograd runs a node earlier the later it was made. So in the backward pass the gradient leaves at `arrive`, what was
computed between the two is differentiated next, and the gradient is awaited at `depart`: the same work hides the way
back. Every rank of the group must depart and arrive in the same order.

Legend: w ranks of the group, r rows here, q rows that arrive, h values of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Journey:
    """Rows under way.

    What links departure and arrival in autograd's graph is an empty tensor: there and back, other numbers of rows
    travel, and neither may be looked at before it has arrived.
    """

    def __init__(self, rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> None:
        self._send, self._receive, self._group = send, receive, group
        self._under_way: tuple[Any, Tensor, Tensor] | None = None
        self._ticket: Tensor | None = _Depart.apply(rows, self)

    def arrive(self) -> Tensor:
        """[q, ...], in the order of the ranks they come from; to be called once."""
        # The graph refers to the journey: were it to refer to the graph, neither would ever be freed.
        ticket, self._ticket = self._ticket, None
        return _Arrive.apply(ticket, self)

    def leave(self, rows: Tensor, back: bool = False) -> None:
        """Send rows there, or gradients back; they must live until they are there, and so are held."""
        send, receive = (self._receive, self._send) if back else (self._send, self._receive)
        rows = rows.contiguous()
        arriving = rows.new_empty(sum(receive), *rows.shape[1:])
        work = dist.all_to_all_single(arriving, rows, receive, send, group=self._group, async_op=True)
        self._under_way = (work, arriving, rows)

    def wait(self) -> Tensor:
        """What has arrived; on a device, what is submitted from now on waits for it."""
        work, arriving, _ = self._under_way
        self._under_way = None
        work.wait()
        return arriving


def depart(rows: Tensor, send: Sequence[int], receive: Sequence[int], group: dist.ProcessGroup) -> Journey:
    """Send consecutive rows to consecutive ranks.

    Args:
        rows: [r, ...].
        send, receive: [w] rows to and from each rank, summing to r and q.
        group: every rank takes part.
    """
    return Journey(rows, [int(n) for n in send], [int(n) for n in receive], group)


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, journey: Journey) -> Tensor:
        ctx.journey = journey
        journey.leave(rows)
        return rows.new_empty(0)

    @staticmethod
    def backward(ctx, _ticket: Tensor) -> tuple[Tensor, None]:
        return ctx.journey.wait(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ticket: Tensor, journey: Journey) -> Tensor:
        ctx.journey = journey
        return journey.wait()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        ctx.journey.leave(grad, back=True)
        return grad.new_empty(0), None
