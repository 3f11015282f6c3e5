"""What a handler is, and what it hands back for a chunk of rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from mindspeed_llm.data.sources import Chunk
from mindspeed_llm.data.tokenizer import Tokenizer


@dataclass
class ChunkResult:
    """Token sequences of one chunk, in row order.

    Attributes:
        streams: per stream the tokens [t] of all sequences one after another, and the length of each sequence.
        num_rows: rows read, including bad ones.
        num_bytes: their size in the source.
        num_trained: tokens that are trained.
        bad: (`file:line`, reason) of rows that could not be used.
        dropped: rows left out for a reason that is no mistake in them.
        columns: every column name seen.
    """

    num_rows: int = 0
    num_bytes: int = 0
    streams: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    num_trained: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    columns: set[str] = field(default_factory=set)


class Handler:
    """Base of all handlers; instances travel to worker processes.

    Attributes:
        stage: "pretrain" or "sft": which training may read the output.
    """

    stage: ClassVar[str]

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    @property
    def needed_columns(self) -> list[str] | None:
        """The only columns that are read, None for all."""
        return None

    @property
    def mapped_columns(self) -> set[str]:
        """Columns the user named: one that never occurs is a mistake."""
        return set()

    @property
    def stream_dtypes(self) -> dict[str, np.dtype]:
        """Stream name (part of the file name) -> dtype of its tokens."""
        raise NotImplementedError

    def process(self, chunk: Chunk) -> ChunkResult:
        """Tokenize a chunk. The result depends on its rows alone."""
        raise NotImplementedError

    @classmethod
    def fits(cls, row: dict[str, Any], map_keys: Mapping[str, Any], json_keys: Sequence[str]) -> bool:
        """Whether a row has the columns that this handler would read with these options."""
        raise NotImplementedError


def concatenate(sequences: list[Any], dtype: np.dtype | type) -> tuple[np.ndarray, np.ndarray]:
    """(tokens of all sequences one after another, length of each)."""
    lengths = np.fromiter(map(len, sequences), np.int32, len(sequences))
    tokens = np.empty(int(lengths.sum(dtype=np.int64)), dtype)
    position = 0
    for sequence, length in zip(sequences, lengths.tolist()):
        tokens[position : position + length] = sequence
        position += length
    return tokens, lengths
