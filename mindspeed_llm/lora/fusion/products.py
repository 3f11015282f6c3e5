"""Products of a tensor-parallel linear in parts of the sequence, so that one is sent while another is multiplied.

Each takes a wide tensor x, which is multiplied by the base's weight, and the adapter's narrow one, which is only sent
along (t ranks, m = s / t rows of each, k inner size, n outer size, R width of the adapter):

    gathered_product    AG(x) W^T, AG(narrow)      x [m, b, k], narrow [m, b, R]
    scattered_product   RS(x W^T), RS(narrow)      x [s, b, k], narrow [s, b, R]
    reduced_product     AR(x W^T), AR(narrow)      x [s, b, k], narrow [s, b, R]

A rank's own rows need no sending: gathering multiplies them while the first chunk travels, scattering while the last
does. With `merge` the narrow tensor rides in front of the first chunk's message, so that nothing is sent for the
adapter alone; otherwise it has an asynchronous collective of its own. What is on its way is held until it has been
waited for.
Extends "communication over computation" (Wang et al., ASPLOS 2023). docs/lora-fusion.md has the times.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_llm.accelerator.ranges import named
from mindspeed_llm.lora.fusion.cost import Schedule
from mindspeed_llm.ops.parallel_matmul import chunked_all_gather_matmul, chunked_matmul_reduce_scatter
from mindspeed_llm.ops.registry import implementation

# gloo runs two collectives at a time, which share the link: the second would only delay the first.
ONE_AFTER_THE_OTHER = ("gloo",)

# gloo's reduce-scatter is an all-reduce (twice the bytes); sent to each other and added up by the receiver it is not.
SCATTERS_BY_EXCHANGE = ("gloo",)

# Name of a part of the sequence in a trace.
CHUNK = "lora: chunk {} of {}"


def cut(rows: int, chunks: int) -> list[slice]:
    """Consecutive parts of `rows`, as equal as can be; at least one, none empty beside others."""
    chunks = max(min(chunks, rows), 1)
    ends = [rows * k // chunks for k in range(chunks + 1)]
    return [slice(a, b) for a, b in zip(ends, ends[1:])]


def multiply(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = x W^T: [..., k] and [n, k] -> [..., n], into a tensor without gaps."""
    with named("lora: base product"):
        torch.mm(x.reshape(-1, x.shape[-1]), weight.t(), out=out.view(-1, out.shape[-1]))


def _others(group: Any) -> list[int]:
    """Ranks of the group beside this one, the nearest first, so that not all begin with the same."""
    t, me = group.size(), group.rank()
    return [(me + step) % t for step in range(1, t)]


class _Gathering:
    """Tensors of every rank on their way to all, in one message."""

    def __init__(self, tensors: list[Tensor], group: Any) -> None:
        self.shapes = [tensor.shape for tensor in tensors]
        self.sent = (
            torch.cat([tensor.reshape(-1) for tensor in tensors]) if len(tensors) > 1 else tensors[0].reshape(-1)
        )
        self.whole = self.sent.new_empty(group.size() * self.sent.numel())
        with named("lora: start all-gather"):
            self.work = dist.all_gather_into_tensor(self.whole, self.sent, group=group, async_op=True)
        self.ranks = group.size()

    def wait(self) -> list[list[Tensor]]:
        """For each rank its tensors."""
        with named("lora: wait for all-gather"):
            self.work.wait()
        sizes = [shape.numel() for shape in self.shapes]
        rows = self.whole.view(self.ranks, -1)
        return [[flat.view(shape) for flat, shape in zip(row.split(sizes), self.shapes)] for row in rows]


class _Scattering:
    """Partial sums on their way to the ranks that own the rows, several tensors in one message.

    `parts[owner]` are the places for the partial sums of another rank's rows; what `wait` gives are the sums that the
    other ranks made of this rank's rows.
    """

    def __init__(self, shapes: list[torch.Size], like: Tensor, group: Any) -> None:
        self.group, self.me, self.shapes = group, group.rank(), shapes
        self.sizes = [shape.numel() for shape in shapes]
        self.exchanges = dist.get_backend(group) in SCATTERS_BY_EXCHANGE
        self.owners = [rank for rank in range(group.size()) if rank != self.me or not self.exchanges]
        self.sent = like.new_empty(len(self.owners), sum(self.sizes))
        if not self.exchanges:
            self.sent[self.me].zero_()
        self.parts = {owner: self._views(row) for owner, row in zip(self.owners, self.sent)}

    def _views(self, row: Tensor) -> list[Tensor]:
        return [flat.view(shape) for flat, shape in zip(row.split(self.sizes), self.shapes)]

    def start(self) -> None:
        """Send what has been written."""
        with named("lora: start reduce-scatter"):
            if self.exchanges:
                self.received = torch.empty_like(self.sent)
                sizes = [sum(self.sizes) * (rank != self.me) for rank in range(self.group.size())]
                self.work = dist.all_to_all_single(
                    self.received.view(-1), self.sent.view(-1), sizes, sizes, group=self.group, async_op=True
                )
            else:
                self.received = self.sent.new_empty(1, self.sent.shape[1])
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
        beside = _Gathering([narrow], group)
        y, _ = kernel(x, weight, group, schedule.chunks)
        return y, torch.cat([tensors[0] for tensors in beside.wait()])
    t, me, parts = group.size(), group.rank(), cut(x.shape[0], schedule.chunks)
    y = x.new_empty(t, *x.shape[:-1], weight.shape[0])
    flying = [_Gathering([narrow, x[parts[0]]] if schedule.merge else [x[parts[0]]], group)]
    beside = None if schedule.merge else _Gathering([narrow], group)
    ahead = 1 if dist.get_backend(group) in ONE_AFTER_THE_OTHER else len(parts)
    flying += [_Gathering([x[rows]], group) for rows in parts[1:ahead]]
    arrived_narrow = []
    for number, rows in enumerate(parts):
        with named(CHUNK, number + 1, len(parts)):
            multiply(x[rows], weight, y[me, rows])
            arrived = flying.pop(0).wait()
            if number + ahead < len(parts):
                flying.append(_Gathering([x[parts[number + ahead]]], group))
            if number == 0 and schedule.merge:
                arrived_narrow = [tensors[0] for tensors in arrived]
            for owner in _others(group):
                multiply(arrived[owner][-1], weight, y[owner, rows])
    if beside is not None:
        arrived_narrow = [tensors[0] for tensors in beside.wait()]
    return y.flatten(0, 1), torch.cat(arrived_narrow)


def scattered_product(
    x: Tensor, narrow: Tensor, weight: Tensor, group: Any, schedule: Schedule
) -> tuple[Tensor, Tensor]:
    """RS(x W^T) [m, b, n] and RS(narrow) [m, b, R]; x [s, b, k], narrow [s, b, R], both this rank's shares."""
    kernel = implementation("matmul_reduce_scatter")
    if kernel is not chunked_matmul_reduce_scatter:
        summed, beside = _start_scatter(narrow, group)
        y = kernel(x, weight, group, schedule.chunks)
        return y, summed.add_(beside.wait()[0])
    t, me = group.size(), group.rank()
    by_owner = x.reshape(t, -1, *x.shape[1:])
    parts, width = cut(by_owner.shape[1], schedule.chunks), weight.shape[0]
    flying, beside = [], None
    if not schedule.merge:
        summed, beside = _start_scatter(narrow, group)
    else:
        narrow = narrow.view(t, -1, *narrow.shape[1:])
        summed = narrow[me]
    for number, rows in enumerate(parts):
        shapes = [torch.Size((rows.stop - rows.start, *x.shape[1:-1], width))]
        rides = number == 0 and schedule.merge
        with named(CHUNK, number + 1, len(parts)):
            message = _Scattering([summed.shape, *shapes] if rides else shapes, x, group)
            for owner in _others(group):
                multiply(by_owner[owner, rows], weight, message.parts[owner][-1])
                if rides:
                    message.parts[owner][0].copy_(narrow[owner])
            message.start()
            flying.append(message)
    y = x.new_empty(*by_owner.shape[1:-1], width)
    multiply(by_owner[me], weight, y)
    for number, (rows, message) in enumerate(zip(parts, flying)):
        sums = message.wait()
        y[rows] += sums[-1]
        if number == 0 and schedule.merge:
            summed = summed + sums[0]
    return y, summed if beside is None else summed.add_(beside.wait()[0])


def _start_scatter(narrow: Tensor, group: Any) -> tuple[Tensor, _Scattering]:
    """This rank's own share of its rows, and the rest on its way."""
    by_owner = narrow.reshape(group.size(), -1, *narrow.shape[1:])
    message = _Scattering([by_owner.shape[1:]], narrow, group)
    for owner in _others(group):
        message.parts[owner][0].copy_(by_owner[owner])
    message.start()
    return by_owner[group.rank()].clone(), message


def reduced_product(x: Tensor, narrow: Tensor, weight: Tensor, group: Any, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """AR(x W^T) [s, b, n] and AR(narrow) [s, b, R]; x [s, b, k], narrow [s, b, R], both this rank's shares."""
    parts = cut(x.shape[0], schedule.chunks)
    # One buffer, the narrow tensor in front: the first message ends where the first chunk of the product does.
    buffer = x.new_empty(narrow.numel() + x[..., 0].numel() * weight.shape[0])
    summed = buffer[: narrow.numel()].view(narrow.shape)
    y = buffer[narrow.numel() :].view(*x.shape[:-1], weight.shape[0])
    summed.copy_(narrow)
    begin = 0 if schedule.merge else narrow.numel()
    flying = [] if schedule.merge else [_start_reduce(buffer[:begin], group)]
    for number, rows in enumerate(parts):
        with named(CHUNK, number + 1, len(parts)):
            multiply(x[rows], weight, y[rows])
            end = begin + y[rows].numel() + (narrow.numel() if begin == 0 else 0)
            flying.append(_start_reduce(buffer[begin:end], group))
            begin = end
    with named("lora: wait for all-reduce"):
        for work in flying:
            work.wait()
    # A copy: what is kept of it for the backward pass must not hold the product.
    return y, summed.clone()


def _start_reduce(tensor: Tensor, group: Any) -> Any:
    with named("lora: start all-reduce"):
        return dist.all_reduce(tensor, group=group, async_op=True)


def gather_narrow(narrow: Tensor, group: Any) -> Tensor:
    """AG(narrow): [m, b, R] -> [s, b, R], where nothing is multiplied beside it."""
    return torch.cat([tensors[0] for tensors in _Gathering([narrow], group).wait()])


def scatter_narrow(narrow: Tensor, group: Any) -> Tensor:
    """RS(narrow): [s, b, R] -> [m, b, R]."""
    own, message = _start_scatter(narrow, group)
    return own.add_(message.wait()[0])


def reduce_narrow(narrow: Tensor, group: Any) -> Tensor:
    """AR(narrow) [s, b, R]."""
    narrow = narrow.clone()
    _start_reduce(narrow, group).wait()
    return narrow
