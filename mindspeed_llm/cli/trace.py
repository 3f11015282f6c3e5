"""`trace summarize`: what traces of `--profile` say, as tables and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mindspeed_llm.training.trace.page import write_page
from mindspeed_llm.training.trace.reading import find_traces
from mindspeed_llm.training.trace.summary import summarize_all
from mindspeed_llm.training.trace.tables import text


def summarize_traces(places: Sequence[str], html: str | None) -> int:
    """Print the tables of all traces that the places name or hold; with `html` write the page too.

    Raises:
        UserError: a place holds no trace, a trace is damaged, or two are of one rank.
    """
    summaries = summarize_all(find_traces(places))
    print(text(summaries))
    if html is not None:
        print(f"\nwrote {write_page(summaries, Path(html))}")
    return 0
