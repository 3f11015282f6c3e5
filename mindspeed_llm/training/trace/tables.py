"""Summaries as tables: of one rank in full, of several as minimum, median and maximum with the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median_low

from mindspeed_llm.training.trace.intervals import length
from mindspeed_llm.training.trace.names import BACKWARD, FORWARD
from mindspeed_llm.training.trace.summary import OTHER, Communication, Summary

OPERATORS_SHOWN = 15
Value = int | float | None
ALL = "all"


@dataclass(frozen=True)
class Column:
    """A title and what is below it: "ns" is shown in ms, "share" in percent, "count" as it is.

    Attributes:
        compared: shown when ranks are compared.
    """

    title: str
    unit: str
    compared: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of (name, values)."""

    title: str
    columns: tuple[Column, ...]
    rows: list[tuple[str, tuple[Value, ...]]]
    note: str = ""


@dataclass(frozen=True)
class Spread:
    """Least, middle and greatest value of a figure over ranks, each with its rank; the middle is one of the values."""

    name: str
    unit: str
    least: tuple[Value, int]
    middle: tuple[Value, int]
    greatest: tuple[Value, int]


@dataclass
class Comparison:
    """A table of several ranks."""

    title: str
    rows: list[Spread] = field(default_factory=list)
    note: str = ""


def tables_of(summary: Summary) -> list[Table]:
    """All tables of one rank; one for which the trace has nothing says so in its note."""
    return [_times(summary), _collectives(summary), _phases(summary), _parts(summary), _operators(summary)]


def _times(summary: Summary) -> Table:
    rows = [(name, length(found)) for name, found in summary.times.named().items()]
    columns = (Column("ms", "ns", True), Column("share", "share"))
    return Table("time", columns, [(name, (time, _share(time, summary.duration))) for name, time in rows])


def _collectives(summary: Summary) -> Table:
    columns = (
        Column("calls", "count"),
        Column("total ms", "ns", True),
        Column("hidden ms", "ns"),
        Column("exposed ms", "ns", True),
        Column("share hidden", "share", True),
    )
    rows = [(kind, _figures(found)) for kind, found in summary.collectives.items()]
    if len(rows) > 1:
        rows.append((ALL, _figures(summary.communication)))
    return Table("communication", columns, rows, "" if rows else "none in this trace")


def _figures(found: Communication) -> tuple[Value, ...]:
    return found.count, found.total, found.hidden, found.exposed, found.share_hidden


def _phases(summary: Summary) -> Table:
    columns = (
        Column("host ms", "ns", True),
        Column("share", "share"),
        Column("computation ms", "ns"),
        Column("communication ms", "ns"),
        Column("exposed ms", "ns"),
    )
    silent = Communication(0, 0, 0)
    names = list(dict.fromkeys([*summary.phase_wall, *summary.phase_computation, *summary.phase_communication]))
    rows = []
    for name in names:
        wall, sent = summary.phase_wall.get(name, 0), summary.phase_communication.get(name, silent)
        computed = summary.phase_computation.get(name, 0)
        rows.append((name, (wall, _share(wall, summary.duration), computed, sent.total, sent.exposed)))
    return Table("phases", columns, rows, "" if rows else _no_host("phases", summary))


def _parts(summary: Summary) -> Table:
    columns = (
        Column("forward ms", "ns"),
        Column("backward ms", "ns"),
        Column("other ms", "ns"),
        Column("computation ms", "ns", True),
        Column("share", "share"),
    )
    whole = sum(sum(found.values()) for found in summary.parts.values())
    rows = []
    for name, found in sorted(summary.parts.items(), key=lambda item: -sum(item[1].values())):
        total = sum(found.values())
        rows.append((name, (found[FORWARD], found[BACKWARD], found[OTHER], total, _share(total, whole))))
    return Table("parts of the model", columns, rows, "" if rows else _no_host("modules", summary))


def _operators(summary: Summary) -> Table:
    columns = (Column("calls", "count"), Column("computation ms", "ns", True), Column("share", "share"))
    whole = sum(time for _, time in summary.operators.values())
    rows = [(name, (calls, time, _share(time, whole))) for name, (calls, time) in summary.operators.items()]
    rest = rows[OPERATORS_SHOWN:]
    shown = rows[:OPERATORS_SHOWN]
    if rest:
        time = sum(values[1] for _, values in rest)
        shown.append((f"{len(rest)} others", (sum(values[0] for _, values in rest), time, _share(time, whole))))
    return Table("operators", columns, shown, "" if rows else "none in this trace")


def _no_host(what: str, summary: Summary) -> str:
    host = "" if summary.device == "cpu" else "; on a device they need --profile-with-cpu"
    return f"no {what} are marked in this trace; --profile marks them{host}"


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def comparisons(summaries: Sequence[Summary]) -> list[Comparison]:
    """The compared columns of all tables over ranks.

    A row that a rank does not have is 0 there, a share that it does not have is left out.
    """
    by_rank = {summary.rank: tables_of(summary) for summary in summaries}
    return [
        _compare({rank: tables[index] for rank, tables in by_rank.items()})
        for index in range(len(next(iter(by_rank.values()))))
    ]


def _compare(tables: dict[int, Table]) -> Comparison:
    first = next(iter(tables.values()))
    names = list(dict.fromkeys(name for table in tables.values() for name, _ in table.rows))
    compared = [(index, column) for index, column in enumerate(first.columns) if column.compared]
    found = Comparison(first.title, note=next((table.note for table in tables.values() if table.note), ""))
    for name in names:
        for index, column in compared:
            absent = None if column.unit == "share" else 0
            values = {
                rank: dict(table.rows).get(name, (absent,) * (index + 1))[index] for rank, table in tables.items()
            }
            spread = _spread(f"{name}: {column.title.removesuffix(' ms')}", column.unit, values)
            if spread is not None:
                found.rows.append(spread if len(compared) > 1 else replace(spread, name=name))
    return found


def _spread(name: str, unit: str, values: dict[int, Value]) -> Spread | None:
    """Of the ranks that have a value; the lowest rank of those with the same."""
    known = sorted((value, rank) for rank, value in values.items() if value is not None)
    return Spread(name, unit, known[0], median_low(known), _greatest(known)) if known else None


def _greatest(known: list[tuple[Value, int]]) -> tuple[Value, int]:
    return next(pair for pair in known if pair[0] == known[-1][0])


def shown(value: Value, unit: str) -> str:
    """As text: ns in ms with three digits, so that nothing above a microsecond is lost."""
    if value is None:
        return "-"
    if unit == "ns":
        return f"{value / 1e6:,.3f}"
    return f"{value:.1%}" if unit == "share" else f"{value:,}"


def heading(summary: Summary) -> str:
    """What was traced, in a line."""
    took = f"{summary.duration / 1e6:,.3f} ms"
    if summary.iterations:
        took += f", {len(summary.iterations)} iterations of {_range(summary.iterations)} ms"
    left = f", {summary.left_out} events without a readable time left out" if summary.left_out else ""
    rank = "unknown rank" if summary.rank is None else f"rank {summary.rank}"
    return f"{rank} on {summary.device}: {took}{left}"


def _range(durations: list[int]) -> str:
    least, greatest = min(durations), max(durations)
    return f"{least / 1e6:,.3f}" + (f" to {greatest / 1e6:,.3f}" if greatest > least else "")


def cells(table: Table | Comparison) -> tuple[list[str], list[list[str]]]:
    """Titles and rows as text, the first column being names."""
    if isinstance(table, Table):
        titles = [table.title, *(column.title for column in table.columns)]
        rows = [[n, *(shown(v, c.unit) for v, c in zip(values, table.columns))] for n, values in table.rows]
        return titles, rows
    titles = [table.title, "min", "rank", "median", "rank", "max", "rank"]
    rows = []
    for row in table.rows:
        unit = " ms" if row.unit == "ns" else ""
        found = [text for v, rank in (row.least, row.middle, row.greatest) for text in (shown(v, row.unit), str(rank))]
        rows.append([row.name + unit, *found])
    return titles, rows


def text(summaries: Sequence[Summary]) -> str:
    """The whole report for a terminal."""
    lines = [heading(summary) for summary in summaries]
    for table in tables_of(summaries[0]) if len(summaries) == 1 else comparisons(summaries):
        lines += ["", *_aligned(table)]
    return "\n".join(lines)


def _aligned(table: Table | Comparison) -> list[str]:
    titles, rows = cells(table)
    if not rows:
        return [f"{table.title}: {table.note}"]
    widths = [max(len(row[i]) for row in [titles, *rows]) for i in range(len(titles))]
    lines = [
        "  ".join([r[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(r[1:], widths[1:]))]) for r in [titles, *rows]
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]
