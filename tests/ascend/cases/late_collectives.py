"""Collectives that a program reads, writes or forgets too early, in processes whose streams are lazy."""

from __future__ import annotations

from typing import Any


def started(rank: int, what: str) -> tuple[Any, Any]:
    """(handle, result) of a collective that is under way; every rank gives ones."""
    import torch
    import torch.distributed as dist

    ones = torch.ones(4, device="npu")
    if what == "all_reduce":
        return dist.all_reduce(ones, async_op=True), ones
    if what == "all_gather":
        whole = torch.zeros(8, device="npu")
        return dist.all_gather_into_tensor(whole, ones, async_op=True), whole
    if what == "reduce_scatter":
        part = torch.zeros(2, device="npu")
        return dist.reduce_scatter_tensor(part, ones, async_op=True), part
    if what == "p2p":
        here = torch.zeros(4, device="npu")
        operations = [dist.P2POp(dist.isend, ones, 1 - rank), dist.P2POp(dist.irecv, here, 1 - rank)]
        (work,) = dist.batch_isend_irecv(operations)
        return work, here
    received = torch.zeros(4, device="npu")
    return dist.all_to_all_single(received, ones, async_op=True), received


def seen(what: str) -> tuple[float, float]:
    """Sum of the result before its end and after it."""
    import torch.distributed as dist

    work, result = started(dist.get_rank(), what)
    early = float(result.sum())
    work.wait()
    return early, float(result.sum())


def overwritten(what: str) -> str:
    """What is said where the program writes into the result of a collective that is under way."""
    import torch.distributed as dist

    work, result = started(dist.get_rank(), what)
    result.fill_(7.0)
    try:
        work.wait()
    except RuntimeError as error:
        return str(error)
    return ""
