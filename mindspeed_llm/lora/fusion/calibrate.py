"""How fast this machine multiplies and sends, measured at start: what the number of chunks is chosen by."""

from __future__ import annotations

import math
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
    found = [(_product_seconds(sizes, dtype, device), 0.0) for sizes in (SMALL, LARGE)]
    for collective in (gather_narrow, scatter_narrow, reduce_narrow):
        gathers = collective is gather_narrow
        for numbers in (FEW, MANY):
            rows = torch.zeros(numbers // (group.size() if gathers else 1), 1, dtype=dtype, device=device)
            found.append(_median_seconds(lambda rows=rows, run=collective: run(rows, group), group))
    agreed = torch.tensor(found, dtype=torch.float32, device=device)
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=group)
    small, large, *collectives = agreed.tolist()
    size = MANY * dtype.itemsize
    threads = torch.get_num_threads() if device.type == "cpu" else math.inf
    links = [_link(few, many, size, threads) for few, many in zip(collectives[::2], collectives[1::2])]
    flops = 2.0 * LARGE[0] * LARGE[1] * LARGE[2] / max(large[0] - small[0], large[0] / 10)
    return Rates(flops, small[0], *links)


def _link(few: tuple[float, float], many: tuple[float, float], size: int, threads: float) -> Link:
    """From (seconds, seconds of the host's processor) of either; products have `threads` threads of that processor."""
    # Where sending more takes no longer within the noise, the bandwidth is taken to be what one message shows.
    bandwidth = size / max(many[0] - few[0], many[0] / 10)
    return Link(few[0], bandwidth, few[1] / threads, max(many[1] - few[1], 0.0) / size / threads)


def _product_seconds(sizes: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> float:
    rows, inner, outer = sizes
    x, weight = (torch.randn(n, inner, device=device).to(dtype) for n in (rows, outer))
    return _median_seconds(lambda: torch.nn.functional.linear(x, weight), None)[0]


def _median_seconds(run: Callable[[], object], group: Any) -> tuple[float, float]:
    """Median time of a call after an unmeasured one, and what all threads of this process worked in it.

    Ranks of a group begin together.
    """
    times, works = [], []
    run()
    for _ in range(ROWS):
        if group is not None:
            dist.barrier(group=group)
        accelerator.current().synchronize()
        begin, worked = time.perf_counter(), time.process_time()
        for _ in range(IN_A_ROW):
            run()
        accelerator.current().synchronize()
        times.append((time.perf_counter() - begin) / IN_A_ROW)
        works.append((time.process_time() - worked) / IN_A_ROW)
    return statistics.median(times), statistics.median(works)
