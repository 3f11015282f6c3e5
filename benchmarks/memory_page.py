"""What benchmarks/memory.py found, as a table on the terminal, as pages of docs/ and as a picture."""

from __future__ import annotations

import platform
import re
import time
from pathlib import Path
from typing import Any

from memory_rows import ROWS, SETTINGS

Rows = dict[str, dict[str, Any]]
HEADER = ("feature", "beside", "peak, MiB", "change", "activations, MiB", "change", "tokens/s", "speed")
BEGIN, END = "<!-- memory rows -->", "<!-- end of memory rows -->"
# Figures of a row inside a table of another page: what stands before a link to the table that is named like the row.
CITED = re.compile(r"\| [^|]*?(?P<link>\(\[(?P<name>[^\]]+)\]\(benchmarks\.md#memory\)\))")


def cells(name: str, row: dict[str, Any]) -> list[str]:
    """One line of the table, by HEADER."""
    changes = [_change(row, key) for key in ("peak_ratio", "activations_ratio")]
    speed = f"{row['speed_ratio']:.2f}x" if "speed_ratio" in row else ""
    sizes = [f"{row[key]:,}" for key in ("peak_mib", "activations_mib", "tokens_per_second")]
    return [name, ROWS[name].beside, sizes[0], changes[0], sizes[1], changes[1], sizes[2], speed]


def _change(row: dict[str, Any], key: str) -> str:
    return f"{100 * (row[key] - 1):+.0f} %" if key in row else ""


def by_setting(rows: Rows) -> dict[str, list[str]]:
    """Setting -> its rows, those that are there."""
    found = {setting: [name for name in rows if ROWS[name].setting == setting] for setting in SETTINGS}
    return {setting: names for setting, names in found.items() if names}


def show(rows: Rows) -> None:
    """Print the table to stderr."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*HEADER, box=None)
    for names in by_setting(rows).values():
        for name in names:
            table.add_row(*cells(name, rows[name]), end_section=name == names[-1])
    Console(stderr=True, width=140).print(table)


def markdown(result: dict[str, Any]) -> str:
    """The part of docs/benchmarks.md between BEGIN and END."""
    rows = result["rows"]
    rounds = f"Medians of {result['rounds']} rounds" if result["rounds"] > 1 else "One round"
    lines = [
        f"{rounds} of `{result['command']}`, {time.strftime('%Y-%m-%d')}, {result['machine']}, torch "
        f"{result['torch']}, Python {platform.python_version()}; load average {result['load_average']} at the end.",
        "",
        f"| {' | '.join(HEADER)} |",
        "|---" * len(HEADER) + "|",
    ]
    for setting, names in by_setting(rows).items():
        lines.append(f"| **{setting}** |" + " |" * (len(HEADER) - 1))
        lines += [f"| {' | '.join(cells(name, rows[name]))} |" for name in names]
    return "\n".join(lines)


def write_table(path: Path, result: dict[str, Any]) -> None:
    """Put the table into a page, in the place of the one that is there.

    Raises:
        SystemExit: the page has no such place.
    """
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise SystemExit(f"{path}: has no lines {BEGIN} and {END}, once each")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    path.write_text(f"{before}{BEGIN}\n{markdown(result)}\n{END}{after}", encoding="utf-8")


def cite(path: Path, rows: Rows) -> None:
    """Write the figures of rows wherever a page's tables link to them by name.

    Raises:
        SystemExit: it names a row that there is not, or that was not measured, or not beside another one.
    """

    def figures(found: re.Match[str]) -> str:
        name = found["name"]
        if name not in ROWS:
            raise SystemExit(f"{path}: {name!r} is no row of memory_rows.py")
        if "speed_ratio" not in rows.get(name, {}):
            raise SystemExit(f"{path}: the row {name!r} has not been measured beside {ROWS[name].beside!r}")
        row = rows[name]
        memory = f"{_change(row, 'peak_ratio')} of the peak, {_change(row, 'activations_ratio')} of activations"
        return f"| {memory}, {row['speed_ratio']:.2f}x {found['link']}"

    path.write_text(CITED.sub(figures, path.read_text(encoding="utf-8")), encoding="utf-8")


# Okabe and Ito's colours, which the colour-blind tell apart; on white, which both themes of a README show.
STATE_COLOUR, ACTIVATION_COLOUR, BASE_COLOUR = "#56B4E9", "#E69F00", "#000000"
HEADING = 1.2


def chart(rows: Rows, path: str) -> None:
    """Draw peak memory as bars, in one group for each setting; a line is the row that a bar is compared with."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups, places, headings, place = by_setting(rows), {}, {}, 0.0
    for setting, names in groups.items():
        headings[setting] = place
        for name in names:
            place -= 1
            places[name] = place
        place -= HEADING
    figure, axes = plt.subplots(figsize=(9, 0.27 * -place + 0.8), facecolor="white")
    widest = max(row["peak_mib"] for row in rows.values())
    for name, at in places.items():
        _bar(axes, rows, name, at)
    for setting, at in headings.items():
        axes.text(0.004 * widest, at, setting, va="center", fontsize=8.5, fontweight="bold")
    axes.set_yticks(list(places.values()), list(places), fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlim(0, 1.38 * widest)
    axes.set_ylim(place + HEADING - 0.6, 0.7)
    axes.set_xlabel("highest memory of a training step on one rank, MiB; a line: what it is compared with", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    kinds = {"weights, gradients, optimizer": STATE_COLOUR, "activations, temporary tensors": ACTIVATION_COLOUR}
    bars = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in kinds.values()]
    axes.legend(bars, list(kinds), fontsize=8, loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=2, frameon=False)
    figure.savefig(path, dpi=120, bbox_inches="tight", facecolor="white")
    plt.close(figure)


def _bar(axes: Any, rows: Rows, name: str, at: float) -> None:
    row, other = rows[name], rows.get(ROWS[name].beside)
    state, saved = row["peak_mib"] - row["activations_mib"], row["activations_mib"]
    axes.barh(at, state, color=STATE_COLOUR, height=0.74)
    axes.barh(at, saved, left=state, color=ACTIVATION_COLOUR, height=0.74)
    text, end = f" {row['peak_mib']:,} MiB", row["peak_mib"]
    if other is not None:
        text += f"  {_change(row, 'peak_ratio')},  {row['speed_ratio']:.2f}x tokens/s"
        axes.plot([other["peak_mib"]] * 2, [at - 0.46, at + 0.46], color=BASE_COLOUR, lw=1)
        end = max(end, other["peak_mib"])
    axes.text(end, at, text, va="center", fontsize=7.5)
