"""Fine-tuning samples: input_ids, attention_mask and labels as preprocessing wrote them, packed or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mindspeed_llm.data.indexed import IndexedReader, fingerprint
from mindspeed_llm.data.record import IGNORE_INDEX, SFT_STREAMS, find_dataset, read_record, sft_stream
from mindspeed_llm.data.splits import split_bounds
from mindspeed_llm.errors import UserError


class SFTDataset:
    """Rows of one part of the data, addressed by their number in it.

    Args:
        prefix: path of the data, with or without suffix.
        split: see `split_bounds`; rows are divided.
        name: "train", "valid" or "test".
        foreign: accept files without our record. Then attention_mask is trusted to number the segments; files packed by
            MindSpeed-LLM's `--pack` without `--neat-pack`, which do not, are refused.

    Raises:
        UserError: data are missing, or were made for pre-training.
    """

    def __init__(self, prefix: str | Path, split: str = "949,50,1", name: str = "train", foreign: bool = False) -> None:
        found = find_dataset(prefix)
        if found is None and not foreign:
            raise UserError(
                f"data: no record '{prefix}.record.json', so it is unfinished, not by preprocess_data.py, or for "
                "pre-training by another program; try: the prefix that preprocess_data.py printed, or preprocess again"
            )
        self.prefix = str(prefix) if found is None else found[0]
        self.record = None if found is None else read_record(self.prefix)
        if self.record is not None and self.record.stage != "sft":
            raise UserError(
                f"data: '{self.prefix}' was built for pre-training by {self.record.handler}, not fine-tuning; try: "
                "pretrain_gpt.py, or preprocess with AlpacaStyleInstructionHandler"
            )
        self._paths = [f"{self.prefix}_{sft_stream(stream)}" for stream in SFT_STREAMS]
        self._input_ids, self._attention_mask, self._labels = (IndexedReader(path) for path in self._paths)
        if any(np.any(other.lengths != self._input_ids.lengths) for other in (self._attention_mask, self._labels)):
            raise UserError(f"data: the streams of '{self.prefix}' differ in their rows; try: preprocess again")
        if self.record is None:
            self._refuse_merged_segments()
        self.start, self.stop = split_bounds(split, len(self._input_ids), name)

    def __len__(self) -> int:
        """Rows of this part."""
        return self.stop - self.start

    @property
    def num_rows(self) -> int:
        """Rows of this part."""
        return len(self)

    @property
    def samples_per_epoch(self) -> int:
        """Rows of this part."""
        return len(self)

    def describe(self, index: int) -> str:
        """Which row of the files sample `index` is, for messages."""
        return f"row {self.start + index} of {self.prefix}"

    def _refuse_merged_segments(self) -> None:
        """Foreign packed rows that do not say where their samples end: equally long rows with one segment each."""
        rows = range(min(len(self._input_ids), 16))
        if len(rows) < 2 or len(set(self._input_ids.lengths.tolist())) > 1:
            return
        if all(np.all(self._attention_mask[row] == 1) for row in rows):
            raise UserError(
                f"data: '{self.prefix}' looks packed by another program without segment numbers (all rows have "
                f"{self._input_ids.lengths[0]} tokens), so attention would cross samples; try: preprocess again"
            )

    @property
    def packed(self) -> bool:
        """Whether rows hold several samples."""
        return self.record is None or self.record.pack != "none"

    def fingerprint(self) -> str:
        """Hex digest of the data."""
        return fingerprint(self._paths)

    def sample(self, index: int) -> dict[str, Any]:
        """Row `index`, without padding.

        Returns:
            input_ids [n] int64; labels [n] int64, already shifted: position i holds the token that i is to predict, or
            -100 where nothing is trained, in particular at the last token of each segment; segment_lengths: tokens of
            each segment, summing to n.

        Raises:
            IndexError: no such row in this part.
            UserError: the segments of the row are not numbered 1, 2, ... followed by 0 for padding.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        row = self.start + index
        numbers = self._attention_mask[row]
        num_tokens = int(np.count_nonzero(numbers))
        numbers = numbers[:num_tokens]
        starts = np.flatnonzero(np.diff(numbers, prepend=0))
        lengths = np.diff(starts, append=num_tokens)
        numbered = np.array_equal(numbers[starts], np.arange(1, len(starts) + 1))
        if not numbered or not num_tokens or lengths.sum() != num_tokens:
            raise UserError(
                f"data: row {row} of '{self._paths[1]}' does not number its segments 1, 2, ...; try: preprocess"
            )
        labels = self._labels[row][:num_tokens].astype(np.int64)
        shifted = np.full(num_tokens, IGNORE_INDEX, np.int64)
        shifted[:-1] = labels[1:]
        # A segment's last token must not predict the first one of the next segment.
        shifted[np.cumsum(lengths) - 1] = IGNORE_INDEX
        return {
            "input_ids": self._input_ids[row][:num_tokens].astype(np.int64),
            "labels": shifted,
            "segment_lengths": lengths.tolist(),
        }
