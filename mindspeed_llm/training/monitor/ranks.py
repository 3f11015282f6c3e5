"""What every rank says of itself at a log line, in one small exchange: times, its own loss, its own gradient."""

from __future__ import annotations

import math
import socket
import statistics
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, fields

import torch
import torch.distributed as dist

from mindspeed_llm import accelerator
from mindspeed_llm.parallel.layout import ParallelLayout


@dataclass(frozen=True)
class RankReport:
    """One rank's words; zero where it has nothing to say.

    Attributes:
        step, communication, data, compute: seconds of an iteration, mean over the log interval.
        window_compute: mean over the straggler window.
        loss: summed over its trained tokens of the last iteration.
        tokens: number of those.
        square_norm: of its own gradient of the loss summed over its replica's tokens, before any reduction.
    """

    step: float = 0.0
    communication: float = 0.0
    data: float = 0.0
    compute: float = 0.0
    window_compute: float = 0.0
    loss: float = 0.0
    tokens: float = 0.0
    square_norm: float = 0.0


def exchange(own: RankReport) -> list[RankReport]:
    """The reports of all ranks; a collective call."""
    device = accelerator.current().current_device()
    words = torch.tensor(astuple(own), dtype=torch.float64, device=device)
    everybody = words.new_empty(dist.get_world_size() * len(fields(RankReport)))
    dist.all_gather_into_tensor(everybody, words)
    return [RankReport(*row) for row in everybody.view(dist.get_world_size(), -1).tolist()]


def host_names() -> list[str]:
    """The host of every rank; a collective call."""
    names: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(names, socket.gethostname())
    return names


# Name of a figure -> what of a rank's time it is.
TIMES: dict[str, Callable[[RankReport], float]] = {
    "step-time": lambda r: r.step,
    "compute-time": lambda r: r.compute,
    "communication-wait": lambda r: r.communication,
    "data-wait": lambda r: r.data,
}


def timing_figures(reports: list[RankReport]) -> dict[str, float]:
    """Minimum, median and maximum over all ranks, in seconds."""
    found = {}
    for name, of in TIMES.items():
        values = sorted(of(report) for report in reports)
        found |= {f"{name}-min": values[0], f"{name}-median": statistics.median(values), f"{name}-max": values[-1]}
    return found


def timing_line(reports: list[RankReport], hosts: list[str]) -> str:
    """The same as a line, with the ranks that are at the ends."""
    parts = []
    for name, of in TIMES.items():
        order = sorted(range(len(reports)), key=lambda rank: of(reports[rank]))
        low, high = order[0], order[-1]
        middle = statistics.median(of(report) for report in reports)
        parts.append(
            f"{name.replace('-', ' ')}: {of(reports[low]) * 1e3:.1f} (rank {low} on {hosts[low]}) / {middle * 1e3:.1f} "
            f"/ {of(reports[high]) * 1e3:.1f} (rank {high} on {hosts[high]})"
        )
    return f" timing of {len(reports)} ranks, min / median / max (ms) | " + " | ".join(parts) + " |"


def stragglers(
    reports: list[RankReport], hosts: list[str], layout: ParallelLayout, threshold: float, window: int
) -> list[str]:
    """A line for each rank whose own work takes more than `threshold` times the median of its peers.

    Peers are the ranks of its pipeline stage, since stages have different work; all ranks where a stage has one alone.
    The median is the lower one of an even number: of two ranks, the slower one is compared with the faster.
    """
    stage = [layout.coordinates(rank).pp for rank in range(len(reports))]
    lines = []
    for rank, report in enumerate(reports):
        peers = [r.window_compute for r, other in zip(reports, stage) if other == stage[rank]]
        if len(peers) == 1:
            peers = [r.window_compute for r in reports]
        median = statistics.median_low(peers)
        if report.window_compute > threshold * median:
            lines.append(
                f"straggler: rank {rank} on {hosts[rank]} computes {report.window_compute / median:.1f}x the median, "
                f"{report.window_compute * 1e3:.1f} ms of its own work per iteration against {median * 1e3:.1f} ms, "
                f"over the last {window} iterations; try: look at clocks, temperature and other processes of that host"
            )
    return lines


def local_figures(reports: list[RankReport], layout: ParallelLayout) -> dict[str, float]:
    """Every replica's own loss, and the norm of every rank's part of its replica's own gradient.

    Both are of the mean over the replica's trained tokens in the last iteration, before gradients are reduced: those
    of one process are the loss and the gradient norm.
    """
    places = [layout.coordinates(rank) for rank in range(len(reports))]
    losses, tokens = [0.0] * layout.dp, [0.0] * layout.dp
    for place, report in zip(places, reports):
        # The last stage knows them; its tensor-parallel ranks hold copies.
        if place.pp == layout.pp - 1 and place.tp == 0:
            losses[place.dp] += report.loss
            tokens[place.dp] += report.tokens
    found: Mapping[str, float] = {
        f"local-loss/replica-{replica}": loss / count
        for replica, (loss, count) in enumerate(zip(losses, tokens))
        if count
    }
    return found | {
        f"local-grad-norm/rank-{rank}": math.sqrt(report.square_norm) / tokens[place.dp]
        for rank, (place, report) in enumerate(zip(places, reports))
        if tokens[place.dp]
    }
