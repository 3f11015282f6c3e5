"""How fast this machine multiplies and sends, measured at start: what the number of chunks is chosen by."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from mindspeed_llm import accelerator
from mindspeed_llm.lora.fusion.cost import Link, Rates
from mindspeed_llm.lora.fusion.products import gather_narrow, reduce_narrow, scatter_narrow

# Numbers in a collective: the latency is what is left at the smaller, the larger makes the bandwidth show.
FEW, MANY = 256, 1 << 18

# Sizes [rows, inner] x [inner, outer] of the products that are timed: one that is all start, one that is all work.
SMALL, LARGE = (8, 64, 64), (256, 1024, 1024)

# A time is that of so many calls in a row, the median of so many rows: ranks that begin apart, and what a link lets
# pass at once before it slows down, weigh little then.
IN_A_ROW, ROWS = 4, 3


def measure(group: Any, dtype: torch.dtype, device: torch.device) -> Rates:
    """Rates that all ranks of the group agree on: of each time the slowest rank's.

    To be called by all of them. Takes about 80 collectives, half of them of 2^18 numbers.
    """
    seconds = [_product_seconds(sizes, dtype, device) for sizes in (SMALL, LARGE)]
    for collective in (gather_narrow, scatter_narrow, reduce_narrow):
        gathers = collective is gather_narrow
        for numbers in (FEW, MANY):
            rows = torch.zeros(numbers // (group.size() if gathers else 1), 1, dtype=dtype, device=device)
            seconds.append(_median_seconds(lambda rows=rows, run=collective: run(rows, group), group))
    agreed = torch.tensor(seconds, dtype=torch.float32, device=device)
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=group)
    small, large, *collectives = agreed.tolist()
    size = MANY * dtype.itemsize
    links = [_link(few, many, size) for few, many in zip(collectives[::2], collectives[1::2])]
    flops = 2.0 * LARGE[0] * LARGE[1] * LARGE[2] / max(large - small, large / 10)
    return Rates(flops, small, *links)


def _link(few: float, many: float, size: int) -> Link:
    # Where sending more takes no longer within the noise, the bandwidth is taken to be what one message shows.
    return Link(few, size / max(many - few, many / 10))


def _product_seconds(sizes: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> float:
    rows, inner, outer = sizes
    x, weight = (torch.randn(n, inner, device=device).to(dtype) for n in (rows, outer))
    return _median_seconds(lambda: torch.nn.functional.linear(x, weight), None)


def _median_seconds(run: Callable[[], object], group: Any) -> float:
    """Median time of a call after an unmeasured one; ranks of a group begin together."""
    times = []
    run()
    for _ in range(ROWS):
        if group is not None:
            dist.barrier(group=group)
        accelerator.current().synchronize()
        begin = time.perf_counter()
        for _ in range(IN_A_ROW):
            run()
        accelerator.current().synchronize()
        times.append((time.perf_counter() - begin) / IN_A_ROW)
    return statistics.median(times)
