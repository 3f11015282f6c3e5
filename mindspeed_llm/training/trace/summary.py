"""One rank's trace in figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from mindspeed_llm.errors import UserError
from mindspeed_llm.training.trace.attribution import Parts, Range, iterations, phases
from mindspeed_llm.training.trace.intervals import Intervals, difference, intersection, length, union
from mindspeed_llm.training.trace.names import BACKWARD, FORWARD, UNKNOWN_PHASE
from mindspeed_llm.training.trace.reading import Trace, read_trace
from mindspeed_llm.training.trace.work import Work, device_work

OTHER = "other"


@dataclass(frozen=True)
class Communication:
    """Of one kind or phase; `total` = `hidden` + `exposed`, ns during which at least one was under way."""

    count: int
    total: int
    hidden: int

    @property
    def exposed(self) -> int:
        """Ns beside which nothing was computed."""
        return self.total - self.hidden

    @property
    def share_hidden(self) -> float | None:
        """Of the total; None where nothing was communicated."""
        return self.hidden / self.total if self.total else None


@dataclass(frozen=True)
class Times:
    """The five states of a device; they share the window among them."""

    computing: Intervals
    hidden: Intervals
    exposed: Intervals
    copying: Intervals
    idle: Intervals

    def named(self) -> dict[str, Intervals]:
        """By the names that tables show."""
        return {
            "computation alone": self.computing,
            "computation beside communication": self.hidden,
            "communication alone": self.exposed,
            "copies and launches alone": self.copying,
            "idle": self.idle,
        }


@dataclass
class Summary:
    """What a trace says about its rank; times in ns.

    Attributes:
        rank: None where the trace does not say.
        window: (start, end): the traced iterations, or all of the trace where none is marked.
        iterations: duration of each.
        phase_wall: phase -> time of the host.
        phase_computation, phase_communication: of the work launched in it.
        parts: part of the model -> {forward, backward, other} -> computation.
        operators: name -> (calls, computation).
        collectives: kind -> its communication; all of it is `communication`.
        phase_ranges: for the timeline.
        left_out: events without a readable time.
    """

    path: Path
    rank: int | None
    device: str
    window: tuple[int, int]
    times: Times
    communication: Communication
    iterations: list[int] = field(default_factory=list)
    phase_wall: dict[str, int] = field(default_factory=dict)
    phase_computation: dict[str, int] = field(default_factory=dict)
    phase_communication: dict[str, Communication] = field(default_factory=dict)
    parts: dict[str, dict[str, int]] = field(default_factory=dict)
    operators: dict[str, tuple[int, int]] = field(default_factory=dict)
    collectives: dict[str, Communication] = field(default_factory=dict)
    phase_ranges: list[Range] = field(default_factory=list)
    left_out: int = 0

    @property
    def duration(self) -> int:
        """Of the window."""
        return self.window[1] - self.window[0]


def summarize(path: str | Path) -> Summary:
    """Read and sum up one trace file.

    Raises:
        UserError: it is no whole trace.
    """
    return sum_up(read_trace(path))


def summarize_all(paths: Iterable[str | Path]) -> list[Summary]:
    """One summary for each rank, by rank.

    Raises:
        UserError: a file is no whole trace, two are of the same rank, or one of several does not say of which it is.
    """
    by_rank: dict[int, Summary] = {}
    summaries = [summarize(path) for path in paths]
    if len(summaries) == 1:
        return summaries
    for summary in summaries:
        path = summary.path
        if summary.rank is None:
            raise UserError(f"trace: {path} is wrong, because it does not say of which rank it is; try: it alone")
        if summary.rank in by_rank:
            raise UserError(
                f"trace: {path} is wrong, because {by_rank[summary.rank].path} is of rank {summary.rank} too; try: "
                "name the files of one run"
            )
        by_rank[summary.rank] = summary
    return [by_rank[rank] for rank in sorted(by_rank)]


def sum_up(trace: Trace) -> Summary:
    """Of a trace that was read."""
    work, marked, host = device_work(trace), iterations(trace), phases(trace)
    first, last = _window(trace, marked)
    inside = [(first, last)]
    computing = intersection(work.computing, inside)
    computation, collectives = _within(work.computation, first, last), _touching(work.collectives, first, last)
    sending = _cut(collectives, inside)
    summary = Summary(
        trace.path,
        trace.rank,
        work.device,
        (first, last),
        _times(inside, computing, sending, intersection(work.copying, inside)),
        _communication(collectives, computing, inside),
        [r.end - r.start for r in marked],
        left_out=trace.left_out,
    )
    if host.ranges:
        summary.phase_ranges, summary.phase_wall = host.ranges, host.wall
    phase_of = host.of(computation) if host.ranges else [UNKNOWN_PHASE] * len(computation)
    _add_phases(summary, computation, phase_of, collectives, host.of(collectives), computing)
    _add_parts(summary, Parts(trace), computation, phase_of)
    calls, spent = Counter(), Counter()
    for piece in computation:
        calls[piece.name] += 1
        spent[piece.name] += piece.spent
    summary.operators = {name: (calls[name], time) for name, time in spent.most_common()}
    by_kind: dict[str, list[Work]] = {}
    for piece in collectives:
        by_kind.setdefault(piece.name, []).append(piece)
    summary.collectives = {kind: _communication(by_kind[kind], computing, inside) for kind in sorted(by_kind)}
    return summary


def _window(trace: Trace, marked: list[Range]) -> tuple[int, int]:
    if marked:
        return min(r.start for r in marked), max(r.end for r in marked)
    return min(event.start for event in trace.events), max(event.end for event in trace.events)


def _within(work: list[Work], first: int, last: int) -> list[Work]:
    """What begins in the window; the device may end it later."""
    return [piece for piece in work if first <= piece.start < last]


def _touching(work: list[Work], first: int, last: int) -> list[Work]:
    """What is under way in the window, also what began before it: `_cut` leaves the part that lies inside."""
    return [piece for piece in work if piece.start < last and max(piece.end, piece.start + 1) > first]


def _cut(work: Iterable[Work], inside: Intervals) -> Intervals:
    return intersection(union((piece.start, piece.end) for piece in work), inside)


def _times(inside: Intervals, computing: Intervals, sending: Intervals, copying: Intervals) -> Times:
    busy = union([*computing, *sending])
    return Times(
        difference(computing, sending),
        intersection(computing, sending),
        difference(sending, computing),
        difference(copying, busy),
        difference(inside, union([*busy, *copying])),
    )


def _communication(work: list[Work], computing: Intervals, inside: Intervals) -> Communication:
    sending = _cut(work, inside)
    return Communication(len(work), length(sending), length(intersection(sending, computing)))


def _add_phases(
    summary: Summary,
    computation: list[Work],
    phase_of: list[str],
    collectives: list[Work],
    sent_in: list[str],
    computing: Intervals,
) -> None:
    spent: Counter[str] = Counter()
    for piece, phase in zip(computation, phase_of):
        spent[phase] += piece.spent
    sent: dict[str, list[Work]] = {}
    for piece, phase in zip(collectives, sent_in):
        sent.setdefault(phase, []).append(piece)
    if summary.phase_ranges:
        summary.phase_computation = dict(spent)
        summary.phase_communication = {
            phase: _communication(pieces, computing, [summary.window]) for phase, pieces in sent.items()
        }


def _add_parts(summary: Summary, parts: Parts, computation: list[Work], phase_of: list[str]) -> None:
    if not parts.known:
        return
    for piece, part, phase in zip(computation, parts.of(computation), phase_of):
        columns = summary.parts.setdefault(part, {FORWARD: 0, BACKWARD: 0, OTHER: 0})
        columns[phase if phase in (FORWARD, BACKWARD) else OTHER] += piece.spent
