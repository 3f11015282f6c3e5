"""Spikes of loss and gradient norm against a running window.

A value is a spike when it lies more than `threshold` robust standard deviations above the median of the window: the
one-sided Hampel identifier (Davies and Gather, "The identification of multiple outliers", JASA 88, 1993), whose median
and MAD stand up to a window of which nearly half are spikes themselves. Leaving out the batches around a spike and
going on from a checkpoint before it is what PaLM did (arXiv 2204.02311, section 5.1).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

# The MAD of a normal distribution is its standard deviation divided by this.
MAD_TO_DEVIATION = 1.4826
# Deviations below this share of the median are no news: a loss that hardly moves has nearly none.
SMALLEST_DEVIATION = 0.01


def deviations_above(value: float, window: Sequence[float]) -> float:
    """How many robust standard deviations `value` lies above the median of `window`."""
    median = statistics.median(window)
    deviation = MAD_TO_DEVIATION * statistics.median(abs(v - median) for v in window)
    return (value - median) / max(deviation, SMALLEST_DEVIATION * abs(median), 1e-12)


def spike_in(name: str, value: float, window: Sequence[float], threshold: float, size: int) -> str | None:
    """What is said about a spike; None when there is none, or when the window holds less than half of `size`."""
    if len(window) < size // 2:
        return None
    far = deviations_above(value, window)
    if far <= threshold:
        return None
    return f"{name} {value:.6g} is {far:.1f} deviations above the median {statistics.median(window):.6g}"


def remember(window: list[float], value: float, size: int) -> None:
    """Add a value, the oldest one leaves."""
    window.append(value)
    del window[:-size]
