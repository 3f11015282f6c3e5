"""Matrix products whose operand or result is spread over ranks along the sequence, in chunks that overlap with sending.

With t ranks, x_r the rows of rank r and W the rank's own part of a weight:

    all_gather_matmul      y = [x_0; ...; x_{t-1}] W^T        every rank gets all rows of y, of its own columns
    matmul_reduce_scatter  y_r = rows r of (sum over ranks of x W^T)   every rank gets the sum of its own rows

In c chunks: chunk k are the k-th of c equal parts of every rank's rows. While chunk k is multiplied, chunk k + 1 is on
its way (gather), or chunk k - 1 is being summed (scatter). Each is the other's transpose, which gives the gradients:
dx of the first is matmul_reduce_scatter(dy, W^T), dx of the second all_gather_matmul(dy_r, W^T).
Source: "communication over computation" of MindSpeed (`--use-ascend-coc`); Wang et al., ASPLOS 2023.

Legend: s sequence, t ranks, c chunks, m = s / (t c), b batch, k inner size, n outer size.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_llm.accelerator.ranges import named
from mindspeed_llm.errors import UserError
from mindspeed_llm.ops.registry import REFERENCE, implementation, register

# Numbers of chunks that MindSpeed knows (`--coc-parallel-num`).
CHUNKS = (1, 2, 4, 8)


def all_gather_matmul(x: Tensor, weight: Tensor, group: dist.ProcessGroup, chunks: int = 1) -> tuple[Tensor, Tensor]:
    """Product of the rows of all ranks; not differentiated.

    Args:
        x: [s / t, b, k]; weight: [n, k].
        chunks: dividing s / t.

    Returns:
        y [s, b, n] and the gathered rows [s, b, k].

    Raises:
        UserError: the chunks do not divide the rows.
    """
    check_chunks(x.shape[0], chunks)
    return implementation("all_gather_matmul")(x, weight, group, chunks)


def matmul_reduce_scatter(x: Tensor, weight: Tensor, group: dist.ProcessGroup, chunks: int = 1) -> Tensor:
    """This rank's rows of the sum of all ranks' products; not differentiated.

    Args:
        x: [s, b, k]; weight: [n, k].
        chunks: dividing s / t.

    Returns:
        [s / t, b, n].

    Raises:
        UserError: the ranks or chunks do not divide the rows.
    """
    check_chunks(x.shape[0], chunks * group.size())
    return implementation("matmul_reduce_scatter")(x, weight, group, chunks)


def check_chunks(rows: int, parts: int) -> None:
    """Refuse a number of rows that cannot be cut evenly.

    Raises:
        UserError: naming the next numbers that can.
    """
    if rows % parts:
        lower = rows // parts * parts
        raise UserError(
            f"sequence: {rows} is wrong, because ranks and chunks need a multiple of {parts}; "
            f"legal: {lower}, {lower + parts}; try: --coc-parallel-num 1"
        )


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T: [..., k] and [n, k] -> [..., n], as one product of matrices whatever the strides of x."""
    return torch.mm(x.reshape(-1, x.shape[-1]), weight.t()).view(*x.shape[:-1], weight.shape[0])


@register("all_gather_matmul", "chunked")
def chunked_all_gather_matmul(
    x: Tensor, weight: Tensor, group: dist.ProcessGroup, chunks: int
) -> tuple[Tensor, Tensor]:
    """All gathers are issued at once; each chunk is multiplied as soon as it is there."""
    t, rows = group.size(), x.shape[0]
    pieces = x.contiguous().chunk(chunks)
    arrived = [piece.new_empty(t * piece.shape[0], *piece.shape[1:]) for piece in pieces]
    with named("coc: start all-gathers"):
        sending = [
            dist.all_gather_into_tensor(whole, piece, group=group, async_op=True)
            for whole, piece in zip(arrived, pieces)
        ]
    if chunks == 1:
        with named("coc: wait for chunk 1 of 1"):
            sending[0].wait()
        return product(arrived[0], weight), arrived[0]
    y = x.new_empty(t, chunks, rows // chunks, *x.shape[1:-1], weight.shape[0])
    gathered = x.new_empty(t, chunks, rows // chunks, *x.shape[1:])
    for index, (work, whole) in enumerate(zip(sending, arrived)):
        with named("coc: wait for chunk {} of {}", index + 1, chunks):
            work.wait()
        by_rank = whole.unflatten(0, (t, -1))
        gathered[:, index] = by_rank
        with named("coc: product of chunk {} of {}", index + 1, chunks):
            y[:, index] = product(by_rank, weight)
    return y.flatten(0, 2), gathered.flatten(0, 2)


@register("matmul_reduce_scatter", "chunked")
def chunked_matmul_reduce_scatter(x: Tensor, weight: Tensor, group: dist.ProcessGroup, chunks: int) -> Tensor:
    """Each chunk's sum is sent on its way as soon as it is multiplied; all are awaited at the end."""
    t = group.size()
    by_rank = x.reshape(t, chunks, x.shape[0] // (t * chunks), *x.shape[1:])
    y = x.new_empty(chunks, by_rank.shape[2], *x.shape[1:-1], weight.shape[0])
    sending = []
    for index in range(chunks):
        with named("coc: product of chunk {} of {}", index + 1, chunks):
            partial = product(by_rank[:, index], weight).flatten(0, 1)
        # The partial sums must live until they are sent: they are kept beside the handle.
        with named("coc: start reduce-scatter"):
            sending.append((dist.reduce_scatter_tensor(y[index], partial, group=group, async_op=True), partial))
    with named("coc: wait for reduce-scatters"):
        for work, _ in sending:
            work.wait()
    return y.flatten(0, 1)


@register("all_gather_matmul", REFERENCE, priority=-1)
def gather_then_multiply(x: Tensor, weight: Tensor, group: dist.ProcessGroup, chunks: int) -> tuple[Tensor, Tensor]:
    """The formula, one after the other."""
    gathered = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(gathered, x.contiguous(), group=group)
    return gathered @ weight.t(), gathered


@register("matmul_reduce_scatter", REFERENCE, priority=-1)
def multiply_then_scatter(x: Tensor, weight: Tensor, group: dist.ProcessGroup, chunks: int) -> Tensor:
    """The formula, one after the other."""
    y = x.new_empty(x.shape[0] // group.size(), *x.shape[1:-1], weight.shape[0])
    dist.reduce_scatter_tensor(y, (x @ weight.t()).contiguous(), group=group)
    return y
