"""To which phase of an iteration and to which part of the model a piece of work belongs.

The host says both: a phase is a range on the training thread, and a module's forward pass is a range around it. An
operator of the backward pass belongs where the operator of the forward pass stands whose gradient it computes; the
profiler links the two. What is recomputed lies in the ranges of the modules that run again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mindspeed_llm.training.trace.names import (
    ADAPTER,
    ADAPTERS,
    ITERATION,
    MODULE,
    OUTSIDE,
    PHASE,
    STEP,
    UNKNOWN_PHASE,
    part,
)
from mindspeed_llm.training.trace.reading import Lane, Trace
from mindspeed_llm.training.trace.work import Work

LINK = "fwdbwd"
# torch draws a range of the host once more on each stream, around the kernels that were launched in it.
ON_DEVICE = "gpu_user_annotation"


@dataclass(frozen=True, slots=True)
class Range:
    """[start, end) ns of something with a name."""

    name: str
    start: int
    end: int


def innermost(ranges: Iterable[Range], moments: Sequence[int]) -> list[str | None]:
    """For each moment the name of the range around it that began last (of those the shortest); None outside all."""
    ordered = sorted(ranges, key=lambda r: (r.start, -r.end))
    found: list[str | None] = [None] * len(moments)
    open_: list[Range] = []
    following = 0
    for index in sorted(range(len(moments)), key=moments.__getitem__):
        moment = moments[index]
        while following < len(ordered) and ordered[following].start <= moment:
            open_.append(ordered[following])
            following += 1
        while open_ and open_[-1].end <= moment:
            open_.pop()
        found[index] = open_[-1].name if open_ else None
    return found


def ranges_named(trace: Trace, prefix: str) -> list[Range]:
    """Ranges of the host whose names begin so, named by the rest."""
    host = (event for event in trace.events if event.category != ON_DEVICE)
    return [Range(e.name.removeprefix(prefix), e.start, e.end) for e in host if _is_range(e.name, prefix)]


def _is_range(name: str, prefix: str) -> bool:
    return name.startswith(prefix) and (prefix != ITERATION or name.removeprefix(prefix).isdigit())


def iterations(trace: Trace) -> list[Range]:
    """The iterations that were traced whole, in order."""
    return ranges_named(trace, ITERATION) or ranges_named(trace, STEP)


@dataclass(frozen=True)
class Phases:
    """Phases of the host.

    Attributes:
        wall: phase -> ns of the host, each moment given to the innermost.
    """

    ranges: list[Range]
    wall: dict[str, int]

    def of(self, work: Sequence[Work]) -> list[str]:
        """The phase in which each was launched; work whose launch is not known is `UNKNOWN_PHASE`."""
        known = [index for index, piece in enumerate(work) if piece.origin]
        found = [UNKNOWN_PHASE] * len(work)
        for index, name in zip(known, innermost(self.ranges, [work[index].origin[1] for index in known])):
            found[index] = name or UNKNOWN_PHASE
        return found


def phases(trace: Trace) -> Phases:
    """Of a trace; none where the host was not traced, or the trace is of another program."""
    ranges = ranges_named(trace, PHASE)
    bounds = sorted({bound for r in ranges for bound in (r.start, r.end)})
    wall: dict[str, int] = {}
    for name, start, end in zip(innermost(ranges, bounds), bounds, bounds[1:]):
        if name is not None:
            wall[name] = wall.get(name, 0) + end - start
    return Phases(ranges, wall)


class Parts:
    """Parts of the model by place on the host."""

    def __init__(self, trace: Trace) -> None:
        self._by_lane: dict[Lane, list[Range]] = {}
        for event in trace.events:
            if event.name.startswith(ADAPTER):
                self._add(event.lane, Range(ADAPTERS, event.start, event.end))
            elif event.name.startswith(MODULE):
                self._add(event.lane, Range(part(event.name.removeprefix(MODULE)), event.start, event.end))
        self.known = bool(self._by_lane)
        self._link_backward(trace)

    def _add(self, lane: Lane, piece: Range) -> None:
        self._by_lane.setdefault(lane, []).append(piece)

    def _link_backward(self, trace: Trace) -> None:
        """A node of the backward pass is a range of the part in which its forward operator ran."""
        links = [link for (kind, _), link in trace.flows.items() if kind == LINK]
        names = self.at([forward for forward, _ in links])
        targets = {backward: name for (_, backward), name in zip(links, names) if name != OUTSIDE}
        for event in trace.events:
            name = targets.get((event.lane, event.start))
            # The engine's own event may begin in the same nanosecond and also holds the gradient's accumulation.
            if name is not None and not event.name.startswith("autograd::engine"):
                self._add(event.lane, Range(name, event.start, event.end))

    def at(self, places: Sequence[tuple[Lane, int]]) -> list[str]:
        """For each (lane, moment) the part, `OUTSIDE` outside all modules."""
        found, by_lane = [OUTSIDE] * len(places), {}
        for index, (lane, _) in enumerate(places):
            by_lane.setdefault(lane, []).append(index)
        for lane, indices in by_lane.items():
            names = innermost(self._by_lane.get(lane, ()), [places[index][1] for index in indices])
            for index, name in zip(indices, names):
                found[index] = name or OUTSIDE
        return found

    def of(self, work: Sequence[Work]) -> list[str]:
        """The part of each; work whose launch is not known is `OUTSIDE`."""
        known = [index for index, piece in enumerate(work) if piece.origin]
        found = [OUTSIDE] * len(work)
        for index, name in zip(known, self.at([work[index].origin for index in known])):
            found[index] = name
        return found
