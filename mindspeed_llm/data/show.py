"""Look at preprocessed data: decoded rows, trained tokens coloured, segment boundaries visible."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mindspeed_llm.data.indexed import IndexedReader
from mindspeed_llm.data.record import IGNORE_INDEX, check_tokenizer, find_dataset, read_record, sft_stream
from mindspeed_llm.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from mindspeed_llm.data.tokenizer import Tokenizer

TRAINED_STYLE = "bold green"
CONTEXT_STYLE = "dim"
PADDING_STYLE = "red"
SEGMENT_MARK = " ┃ "


def show(
    prefix: str | Path,
    tokenizer: Tokenizer | None = None,
    count: int = 10,
    console: Console | None = None,
    weight: Fraction | None = None,
) -> None:
    """Print the first rows of a data set.

    Args:
        prefix: as for training.
        tokenizer: decodes; None prints ids.
        count: rows to print.
        console: where to, default stdout.
        weight: in a blend, for the title.

    Raises:
        UserError: no data set, or it was made with another tokenizer.
    """
    from rich.console import Console

    console = console or Console()
    found = find_dataset(prefix)
    if found is None:
        raise UserError(f"data: '{prefix}' has no record; legal: a prefix written by preprocess_data.py")
    base, streams = found
    record = read_record(base)
    if tokenizer is not None:
        check_tokenizer(base, tokenizer)
    share = "" if weight is None else f"weight {float(weight):g}, "
    console.print(f"{base}: {share}{record.stage}, {record.handler}, template {record.template}, {record.counts}")
    console.print(f"[{TRAINED_STYLE}]trained[/]  [{CONTEXT_STYLE}]context[/]  {SEGMENT_MARK.strip()} segment boundary")
    rows = _sft_rows(base) if record.stage == "sft" else _pretrain_rows(f"{base}_{streams[0]}")
    for number, (ids, trained, segments) in zip(range(count), rows):
        console.rule(f"row {number}: {len(ids)} tokens, {int(trained.sum())} trained")
        console.print(render_row(ids, trained, segments, tokenizer), soft_wrap=True)


def render_row(ids: np.ndarray, trained: np.ndarray, segments: np.ndarray, tokenizer: Tokenizer | None) -> Text:
    """One row as styled text.

    Args:
        ids: [n] tokens.
        trained: [n] bool.
        segments: [n] segment numbers, 0 for padding.
    """
    from rich.text import Text

    text = Text()
    changes = np.flatnonzero((np.diff(trained.astype(np.int8)) != 0) | (np.diff(segments) != 0)) + 1
    bounds = [0, *changes.tolist(), len(ids)]
    for start, stop in zip(bounds[:-1], bounds[1:]):
        if start and segments[start] != segments[start - 1]:
            text.append(SEGMENT_MARK, PADDING_STYLE)
        if segments[start] == 0:
            text.append(f"{stop - start} x padding", PADDING_STYLE)
            continue
        text.append(_decode(ids[start:stop], tokenizer), TRAINED_STYLE if trained[start] else CONTEXT_STYLE)
    return text


def _decode(ids: Sequence[int], tokenizer: Tokenizer | None) -> str:
    return " ".join(map(str, ids)) + " " if tokenizer is None else tokenizer.decode(ids)


def _sft_rows(base: str) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    ids, segments, labels = (
        IndexedReader(f"{base}_{sft_stream(stream)}") for stream in ("input_ids", "attention_mask", "labels")
    )
    for row in range(len(ids)):
        yield ids[row], labels[row] != IGNORE_INDEX, segments[row]


def _pretrain_rows(path: str) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    reader = IndexedReader(path)
    for row in range(len(reader)):
        ids = reader[row]
        yield ids, np.ones(len(ids), bool), np.ones(len(ids), np.int64)
