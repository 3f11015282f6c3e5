"""The summary as one HTML page that needs nothing beside itself: a timeline per rank and the tables."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from mindspeed_llm.training.trace.attribution import innermost
from mindspeed_llm.training.trace.intervals import Intervals
from mindspeed_llm.training.trace.reading import ASCEND_FOLDER, TORCH_TRACE
from mindspeed_llm.training.trace.summary import Summary
from mindspeed_llm.training.trace.tables import Comparison, Table, cells, comparisons, heading, tables_of

# Columns of a timeline, each of which shows its share of the window.
STEPS = 1000
LANE_HEIGHT, LABEL_WIDTH = 18, 210
# States of a device -> colour; the first three are the ones to look at.
COLOURS = {
    "computation alone": "#4c78a8",
    "computation beside communication": "#54a24b",
    "communication alone": "#e45756",
    "copies and launches alone": "#b279a2",
    "idle": "#bab0ac",
}
PHASE_COLOURS = ("#9ecae9", "#ffbf79", "#88d27a", "#d6a5c9", "#d8b5a5", "#83bcb6", "#fcbfd2", "#d9d9d9")
# Opacities that are told apart.
LEVELS = 10
STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 1260px; padding: 0 1em; }
table { border-collapse: collapse; margin: 1.5em 0; }
th, td { padding: 2px 12px; text-align: right; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; }
th { border-bottom: 1px solid; }
.legend span { color: #000; padding: 1px 8px; }
svg { display: block; width: 100%; height: auto; }
svg text { font: 12px system-ui, sans-serif; fill: currentColor; }
"""


def page(summaries: Sequence[Summary]) -> str:
    """The page of one rank, or of several in comparison."""
    parts = [f"<h1>{escape(_title(summaries))}</h1>"]
    for summary in summaries:
        parts += [f"<h2>{escape(heading(summary))}</h2>", f"<p>{escape(str(summary.path))}</p>", timeline(summary)]
    tables = tables_of(summaries[0]) if len(summaries) == 1 else comparisons(summaries)
    parts += [_table(table) for table in tables]
    head = f'<meta charset="utf-8">\n<title>{escape(_title(summaries))}</title>\n<style>{STYLE}</style>'
    body = "\n".join(parts)
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def write_page(summaries: Sequence[Summary], path: Path) -> Path:
    """Write it; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(summaries), encoding="utf-8")
    return path


def page_beside(trace: Path) -> Path:
    """Where the page of a trace of `--profile` lies: NAME.summary.html, or in torch_npu's folder summary.html."""
    if trace.parent.name == ASCEND_FOLDER:
        return trace.parent.parent / "summary.html"
    return trace.with_name(trace.name.removesuffix(".gz").removesuffix(TORCH_TRACE) + ".summary.html")


def _title(summaries: Sequence[Summary]) -> str:
    ranks = ", ".join("unknown" if summary.rank is None else str(summary.rank) for summary in summaries)
    return f"Trace of rank{'s' if len(summaries) > 1 else ''} {ranks}"


def _table(table: Table | Comparison) -> str:
    titles, rows = cells(table)
    if not rows:
        return f"<p>{escape(table.title)}: {escape(table.note)}</p>"
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>\n<tr>{head}</tr>\n{body}\n</table>"


def timeline(summary: Summary) -> str:
    """An SVG: a lane for each state of the device, and one of the phases."""
    lanes = [
        _lane(name, row, _shares(found, summary.window), COLOURS[name])
        for row, (name, found) in enumerate((n, f) for n, f in summary.times.named().items() if f)
    ]
    colours = {name: PHASE_COLOURS[i % len(PHASE_COLOURS)] for i, name in enumerate(summary.phase_wall)}
    if summary.phase_ranges:
        lanes.append(_phase_lane(summary, len(lanes), colours))
    height = len(lanes) * LANE_HEIGHT + 20
    end = f'<text x="{LABEL_WIDTH + STEPS}" y="{height - 4}" text-anchor="end">{summary.duration / 1e6:,.3f} ms</text>'
    start = f'<text x="{LABEL_WIDTH}" y="{height - 4}">0</text>'
    width = LABEL_WIDTH + STEPS
    drawn = f'<svg viewBox="0 0 {width} {height}" role="img">\n' + "\n".join([*lanes, start, end]) + "\n</svg>"
    legend = [f'<span style="background: {colour}">{escape(name)}</span>' for name, colour in colours.items()]
    return drawn + (f'\n<p class="legend">phases of the host: {" ".join(legend)}</p>' if legend else "")


def _shares(found: Intervals, window: tuple[int, int]) -> list[float]:
    """Of each of the STEPS equal pieces of the window, how much lies in the intervals."""
    width = (window[1] - window[0]) / STEPS
    shares = [0.0] * STEPS
    for start, end in found:
        left, right = (start - window[0]) / width, (end - window[0]) / width
        first, last = int(left), min(int(right), STEPS - 1)
        for step in range(first, last + 1):
            shares[step] += min(right, step + 1) - max(left, step)
    return shares


def _lane(name: str, row: int, shares: list[float], colour: str) -> str:
    levels = [min(-int(-share * LEVELS // 1), LEVELS) if share > 0 else 0 for share in shares]
    pieces = [
        f'<rect x="{LABEL_WIDTH + start}" y="{row * LANE_HEIGHT}" width="{end - start}" height="{LANE_HEIGHT - 3}" '
        f'fill="{colour}" fill-opacity="{level / LEVELS:g}"/>'
        for level, start, end in _runs(levels)
        if level
    ]
    label = f'<text x="0" y="{row * LANE_HEIGHT + 12}">{escape(name)}</text>'
    return "\n".join([label, *pieces])


def _phase_lane(summary: Summary, row: int, colours: dict[str, str]) -> str:
    first, width = summary.window[0], summary.duration / STEPS
    middles = [first + round((step + 0.5) * width) for step in range(STEPS)]
    pieces = [
        f'<rect x="{LABEL_WIDTH + start}" y="{row * LANE_HEIGHT}" width="{end - start}" height="{LANE_HEIGHT - 3}" '
        f'fill="{colours[name]}"><title>{escape(name)}</title></rect>'
        for name, start, end in _runs(innermost(summary.phase_ranges, middles))
        if name is not None
    ]
    label = f'<text x="0" y="{row * LANE_HEIGHT + 12}">phases of the host</text>'
    return "\n".join([label, *pieces])


def _runs(values: Sequence) -> list[tuple]:
    """(value, first, end) of neighbours that are the same."""
    runs: list[tuple] = []
    for index, value in enumerate(values):
        if runs and runs[-1][0] == value:
            runs[-1] = value, runs[-1][1], index + 1
        else:
            runs.append((value, index, index + 1))
    return runs
