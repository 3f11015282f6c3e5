"""Products of a tensor-parallel linear in parts of the sequence, so that one is sent while another is multiplied.

Each takes a wide tensor x, which is multiplied by the base's weight, and the adapter's narrow one, which is only sent
along (t ranks, m = s / t rows of each, k inner size, n outer size, R width of the adapter):

    gathered_product    AG(x) W^T, AG(narrow)      x [m, b, k], narrow [m, b, R]
    scattered_product   RS(x W^T), RS(narrow)      x [s, b, k], narrow [s, b, R]
    reduced_product     AR(x W^T), AR(narrow)      x [s, b, k], narrow [s, b, R]

A rank's own rows need no sending: gathering multiplies them while the first chunk travels, scattering while the last
does. With `merge` the narrow tensor rides in front of the first chunk's message, so that nothing is sent for the
adapter alone; otherwise it has an asynchronous collective of its own. What is on its way is held until it has been
waited for. Inside, all are matrices: a row for each token of the batch.
Extends "communication over computation" (Wang et al., ASPLOS 2023). docs/lora-fusion.md has the times.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_llm.accelerator.ranges import named
from mindspeed_llm.lora.fusion.cost import Schedule
from mindspeed_llm.lora.fusion.exchange import Exchange, replaces_collectives
from mindspeed_llm.ops.parallel_matmul import chunked_all_gather_matmul, chunked_matmul_reduce_scatter
from mindspeed_llm.ops.registry import implementation

# Name of a part of the sequence in a trace.
CHUNK = "lora: chunk {} of {}"


def cut(rows: int, chunks: int) -> list[slice]:
    """Consecutive parts of `rows`, as equal as can be; at least one, none empty beside others."""
    chunks = max(min(chunks, rows), 1)
    ends = [rows * k // chunks for k in range(chunks + 1)]
    return [slice(a, b) for a, b in zip(ends, ends[1:])]


def matrix(x: Tensor) -> Tensor:
    """[..., k] -> [rows, k]."""
    return x.reshape(-1, x.shape[-1])


def multiply(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = x W^T: [rows, k] and [n, k] -> [rows, n], into a tensor without gaps."""
    with named("lora: base product"):
        torch.mm(x, weight.t(), out=out)


def _others(group: Any) -> list[int]:
    """Ranks of the group beside this one, the nearest first, so that not all begin with the same."""
    t, me = group.size(), group.rank()
    return [(me + step) % t for step in range(1, t)]


def _split(flat: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Tensors that follow one another in a vector."""
    found, begin = [], 0
    for shape in shapes:
        end = begin + prod(shape)
        found.append(flat[begin:end].view(shape))
        begin = end
    return found


class _Gathering:
    """Tensors of every rank on their way to all, in one message; the receiving end is there before `start`."""

    def __init__(self, tensors: list[Tensor], group: Any) -> None:
        self.own, self.group, self.me = tensors, group, group.rank()
        self.shapes = [tuple(tensor.shape) for tensor in tensors]
        self.numbers = sum(prod(shape) for shape in self.shapes)
        self.exchange = Exchange(self.numbers, tensors[0], group) if replaces_collectives(group) else None

    @property
    def queues(self) -> bool:
        """Whether several may be started at once, each on its way when those before it have left."""
        return self.exchange is None or self.exchange.is_large

    def start(self) -> _Gathering:
        """Send them."""
        flat = [tensor.reshape(-1) for tensor in self.own]
        sent = torch.cat(flat) if len(flat) > 1 else flat[0].contiguous()
        with named("lora: start all-gather"):
            if self.exchange is not None:
                self.exchange.start(sent[None])
            else:
                self.sent, self.whole = sent, sent.new_empty(self.group.size(), self.numbers)
                self.work = dist.all_gather_into_tensor(self.whole.view(-1), sent, group=self.group, async_op=True)
        return self

    def wait(self) -> list[list[Tensor]]:
        """For each rank its tensors."""
        with named("lora: wait for all-gather"):
            (self.work if self.exchange is None else self.exchange).wait()
        if self.exchange is None:
            return [_split(row, self.shapes) for row in self.whole]
        arrived = [_split(row, self.shapes) for row in self.exchange.received]
        return [*arrived[: self.me], self.own, *arrived[self.me :]]


class _Scattering:
    """Partial sums on their way to the ranks that own the rows, several tensors in one message.

    `parts[owner]` are the places for the partial sums of another rank's rows, made by `prepare`; what `wait` gives are
    the sums that the other ranks made of this rank's rows. The receiving end is there from the start.
    """

    def __init__(self, shapes: list[tuple[int, ...]], like: Tensor, group: Any) -> None:
        self.group, self.me, self.shapes, self.like = group, group.rank(), shapes, like
        self.numbers = sum(prod(shape) for shape in shapes)
        self.exchange = Exchange(self.numbers, like, group) if replaces_collectives(group) else None

    def prepare(self) -> _Scattering:
        """Make `parts`, to be written to."""
        owners = [rank for rank in range(self.group.size()) if rank != self.me or self.exchange is None]
        self.sent = self.like.new_empty(len(owners), self.numbers)
        if self.exchange is None:
            self.sent[self.me].zero_()
        self.parts = {owner: self._views(row) for owner, row in zip(owners, self.sent)}
        return self

    def _views(self, row: Tensor) -> list[Tensor]:
        return _split(row, self.shapes)

    def start(self) -> None:
        """Send what has been written."""
        with named("lora: start reduce-scatter"):
            if self.exchange is not None:
                self.exchange.start(self.sent)
                self.work, self.received = self.exchange, self.exchange.received
            else:
                self.received = self.sent.new_empty(1, self.numbers)
                self.work = dist.reduce_scatter_tensor(
                    self.received.view(-1), self.sent.view(-1), group=self.group, async_op=True
                )

    def wait(self) -> list[Tensor]:
        """The sums for this rank's rows, its own share left out."""
        with named("lora: wait for reduce-scatter"):
            self.work.wait()
        total = self.received[0]
        for more in self.received[1:]:
            total += more
        return self._views(total)


def gathered_product(
    x: Tensor, narrow: Tensor, weight: Tensor, group: Any, schedule: Schedule
) -> tuple[Tensor, Tensor]:
    """AG(x) W^T [s, b, n] and AG(narrow) [s, b, R]; x [m, b, k], narrow [m, b, R]."""
    kernel = implementation("all_gather_matmul")
    if kernel is not chunked_all_gather_matmul:  # one that sends by itself
        beside = _Gathering([narrow], group).start()
        y, _ = kernel(x, weight, group, schedule.chunks)
        return y, torch.cat([tensors[0] for tensors in beside.wait()])
    t, me, own = group.size(), group.rank(), matrix(x)
    parts = cut(own.shape[0], schedule.chunks)
    y = own.new_empty(t, own.shape[0], weight.shape[0])
    contents = [[own[rows]] for rows in parts]
    if schedule.merge:
        contents[0].insert(0, narrow)
    first = _Gathering(contents[0], group)
    beside = None if schedule.merge else _Gathering([narrow], group)
    messages = [first, *(_Gathering(content, group) for content in contents[1:])]
    messages[0].start()
    if beside is not None:
        beside.start()
    ahead = len(parts) if messages[-1].queues else 1
    for message in messages[1:ahead]:
        message.start()
    whole_narrow = []
    for number, (rows, message) in enumerate(zip(parts, messages)):
        with named(CHUNK, number + 1, len(parts)):
            multiply(own[rows], weight, y[me, rows])
            arrived = message.wait()
            if number + ahead < len(parts):
                messages[number + ahead].start()
            if number == 0 and schedule.merge:
                whole_narrow = [tensors[0] for tensors in arrived]
            for owner in _others(group):
                multiply(arrived[owner][-1], weight, y[owner, rows])
        messages[number] = None  # what has been multiplied need not be kept
    if beside is not None:
        whole_narrow = [tensors[0] for tensors in beside.wait()]
    return y.view(t * x.shape[0], *x.shape[1:-1], weight.shape[0]), torch.cat(whole_narrow)


def scattered_product(
    x: Tensor, narrow: Tensor, weight: Tensor, group: Any, schedule: Schedule
) -> tuple[Tensor, Tensor]:
    """RS(x W^T) [m, b, n] and RS(narrow) [m, b, R]; x [s, b, k], narrow [s, b, R], both this rank's shares."""
    kernel = implementation("matmul_reduce_scatter")
    if kernel is not chunked_matmul_reduce_scatter:
        summed, beside = _start_scatter(narrow, group)
        y = kernel(x, weight, group, schedule.chunks)
        return y, summed.add_(beside.wait()[0])
    t, me, width = group.size(), group.rank(), weight.shape[0]
    shape, by_owner = (x.shape[0] // t, *x.shape[1:-1]), x.reshape(t, -1, x.shape[-1])
    parts = cut(by_owner.shape[1], schedule.chunks)
    shapes = [[(rows.stop - rows.start, width)] for rows in parts]
    beside = None
    if schedule.merge:
        narrow = narrow.reshape(t, *shape, narrow.shape[-1])
        summed = narrow[me]
        shapes[0].insert(0, tuple(summed.shape))
    else:
        summed, beside = _start_scatter(narrow, group)
    messages = [_Scattering(of_part, x, group) for of_part in shapes]
    for number, (rows, message) in enumerate(zip(parts, messages)):
        with named(CHUNK, number + 1, len(parts)):
            message.prepare()
            for owner in _others(group):
                multiply(by_owner[owner, rows], weight, message.parts[owner][-1])
                if number == 0 and schedule.merge:
                    message.parts[owner][0].copy_(narrow[owner])
            message.start()
    y = x.new_empty(by_owner.shape[1], width)
    multiply(by_owner[me], weight, y)
    for number, (rows, message) in enumerate(zip(parts, messages)):
        sums = message.wait()
        y[rows] += sums[-1]
        if number == 0 and schedule.merge:
            summed = summed + sums[0]
    return y.view(*shape, width), summed if beside is None else summed.add_(beside.wait()[0])


def _start_scatter(narrow: Tensor, group: Any) -> tuple[Tensor, _Scattering]:
    """This rank's own share of its rows, and the rest on its way."""
    by_owner = narrow.reshape(group.size(), -1, *narrow.shape[1:])
    message = _Scattering([tuple(by_owner.shape[1:])], narrow, group).prepare()
    for owner in _others(group):
        message.parts[owner][0].copy_(by_owner[owner])
    message.start()
    return by_owner[group.rank()].clone(), message


class _Reducing:
    """Shares of a sum on their way to all, which every rank then has; a part of a buffer, summed in place."""

    def __init__(self, shares: Tensor, group: Any) -> None:
        # Two ranks add up what they exchange: each the same numbers, and both the same sum.
        self.shares, self.group = shares, group
        exchanges = group.size() == 2 and replaces_collectives(group)
        self.exchange = Exchange(shares.numel(), shares, group) if exchanges else None

    def start(self) -> _Reducing:
        """Send what has been written."""
        with named("lora: start all-reduce"):
            if self.exchange is not None:
                self.exchange.start(self.shares[None])
            else:
                self.work = dist.all_reduce(self.shares, group=self.group, async_op=True)
        return self

    def wait(self) -> None:
        """The shares are sums then."""
        with named("lora: wait for all-reduce"):
            (self.work if self.exchange is None else self.exchange).wait()
        if self.exchange is not None:
            self.shares += self.exchange.received[0]


def reduced_product(x: Tensor, narrow: Tensor, weight: Tensor, group: Any, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """AR(x W^T) [s, b, n] and AR(narrow) [s, b, R]; x [s, b, k], narrow [s, b, R], both this rank's shares."""
    own, width = matrix(x), weight.shape[0]
    parts, front = cut(own.shape[0], schedule.chunks), narrow.numel()
    # One buffer, the narrow tensor in front: the first message ends where the first chunk of the product does.
    buffer = x.new_empty(front + own.shape[0] * width)
    summed, y = buffer[:front].view(narrow.shape), buffer[front:].view(-1, width)
    summed.copy_(narrow)
    ends = [front + rows.stop * width for rows in parts]
    begins = [0 if schedule.merge else front, *ends[:-1]]
    beside = [] if schedule.merge else [_Reducing(buffer[:front], group).start()]
    messages = [_Reducing(buffer[begin:end], group) for begin, end in zip(begins, ends)]
    for number, (rows, message) in enumerate(zip(parts, messages)):
        with named(CHUNK, number + 1, len(parts)):
            multiply(own[rows], weight, y[rows])
            message.start()
    for message in (*beside, *messages):
        message.wait()
    # A copy: what is kept of it for the backward pass must not hold the product.
    return y.view(*x.shape[:-1], width), summed.clone()


def gather_narrow(narrow: Tensor, group: Any) -> Tensor:
    """AG(narrow): [m, b, R] -> [s, b, R], where nothing is multiplied beside it."""
    return torch.cat([tensors[0] for tensors in _Gathering([narrow], group).start().wait()])


def scatter_narrow(narrow: Tensor, group: Any) -> Tensor:
    """RS(narrow): [s, b, R] -> [m, b, R]."""
    own, message = _start_scatter(narrow, group)
    return own.add_(message.wait()[0])


def reduce_narrow(narrow: Tensor, group: Any) -> Tensor:
    """AR(narrow) [s, b, R]."""
    narrow = narrow.clone()
    _Reducing(narrow.view(-1), group).start().wait()
    return narrow
