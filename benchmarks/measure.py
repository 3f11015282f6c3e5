"""Common to the benchmarks: sides that take turns, their medians, and what the machine's matrix product reaches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence


def interleaved(
    sides: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of every side in every round, by `clock`.

    All sides run once a round, beginning with another one each time, so that a slow moment of the machine meets each
    of them alike. Each side runs once before, unmeasured.
    """
    for run in sides.values():
        run()
    names = list(sides)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            begin = clock()
            sides[name]()
            seconds[name].append(clock() - begin)
    return seconds


def median_ratio(slower: Sequence[float], faster: Sequence[float]) -> float:
    """Median over the rounds of how many times as long `slower` took."""
    return statistics.median(a / b for a, b in zip(slower, faster))


def matmul_flops_per_second(rows: int, shapes: Mapping[tuple[int, int], int], repeats: int = 3) -> float:
    """bf16 FLOP/s of plain matrix products [rows, in] x [in, out], best of `repeats`.

    Args:
        shapes: (in, out) -> how often it occurs in a model; the rate is that of all of them one after the other.
    """
    import torch

    seconds = flops = 0.0
    for (width, out), count in shapes.items():
        a, b = torch.randn(rows, width).bfloat16(), torch.randn(out, width).bfloat16()
        torch.nn.functional.linear(a, b)
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            torch.nn.functional.linear(a, b)
            times.append(time.perf_counter() - begin)
        seconds += count * min(times)
        flops += count * 2.0 * rows * width * out
    return flops / seconds
