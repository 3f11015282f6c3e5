"""Pre-training samples: documents one after another, cut into windows of seq_length + 1 tokens."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mindspeed_llm.data.indexed import IndexedReader, fingerprint
from mindspeed_llm.data.record import IGNORE_INDEX, DataRecord, find_dataset, read_record
from mindspeed_llm.data.samplers import LastEpochs, permutation
from mindspeed_llm.data.splits import EmptyPart, split_bounds
from mindspeed_llm.errors import UserError


class PretrainDataset:
    """Samples numbered from 0 without end.

    In each epoch the documents are put into a new order and concatenated, the stream is cut into windows (the rest that
    fills no window is left out), and the windows are shuffled. Both orders depend on (seed, epoch) only: unlike
    Megatron's, the order of the data does not change when more iterations are asked for.

    Args:
        prefix: path of the data, with or without the suffix of the stream (`_text_document`).
        seq_length: tokens per sample.
        split: see `split_bounds`; documents are divided, so no document is in two parts.
        name: "train", "valid" or "test".
        seed: of both shuffles.
        shuffle: False keeps documents and windows in the file's order.
        reset_attention_mask: give the lengths of the documents in a sample as `segment_lengths`, so that attention
            stays inside each, and do not train the first token of a document on the one before it.

    Raises:
        UserError: data are missing or were made for another stage.
        EmptyPart: they hold fewer tokens than one window.
    """

    def __init__(
        self,
        prefix: str | Path,
        seq_length: int,
        split: str = "949,50,1",
        name: str = "train",
        seed: int = 1234,
        shuffle: bool = True,
        reset_attention_mask: bool = False,
    ) -> None:
        self.path, self.record = _open_stream(prefix)
        self.seq_length = seq_length
        self.seed = seed
        self.shuffle = shuffle
        self.reset_attention_mask = reset_attention_mask
        self.reader = IndexedReader(self.path)
        # Like Megatron's: a "document" of the split and the shuffle is one sequence of the file.
        self.start, self.stop = split_bounds(split, len(self.reader), name)
        self.num_tokens = int(self.reader.lengths[self.start : self.stop].sum(dtype=np.int64))
        self.samples_per_epoch = max(0, self.num_tokens - 1) // seq_length
        if self.samples_per_epoch == 0:
            raise EmptyPart(
                f"data: the {name} part of '{self.path}' has {self.num_tokens} tokens in {self.stop - self.start} "
                f"documents, fewer than the {seq_length + 1} of one sample; try: smaller --seq-length, other --split "
                "or more data"
            )
        self._streams = LastEpochs(self._stream)
        self._windows = LastEpochs(partial(permutation, self.samples_per_epoch, seed))

    @property
    def num_rows(self) -> None:
        """None: samples are numbered over all epochs, the order is the data set's own affair."""
        return None

    def fingerprint(self) -> str:
        """Hex digest of the data."""
        return fingerprint([self.path])

    def _stream(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(documents in this epoch's order, position in the stream where each starts and the last ends)."""
        documents = np.arange(self.start, self.stop)
        if self.shuffle:
            documents = documents[permutation(len(documents), self.seed, epoch, "documents")]
        bounds = np.zeros(len(documents) + 1, np.int64)
        np.cumsum(self.reader.lengths[documents], dtype=np.int64, out=bounds[1:])
        return documents, bounds

    def describe(self, index: int) -> str:
        """Which sample `index` is, for messages."""
        epoch, position = self._locate(index)
        return f"sample {position} in epoch {epoch} of {self.path}"

    def _locate(self, index: int) -> tuple[int, int]:
        """(epoch, window in the epoch's stream) of a sample."""
        epoch, position = divmod(index, self.samples_per_epoch)
        return epoch, int(self._windows(epoch)[position]) if self.shuffle else position

    def sample(self, index: int) -> dict[str, Any]:
        """Sample `index` (0, 1, 2, ... over all epochs).

        Returns:
            input_ids [seq_length] int64; labels [seq_length] int64, already shifted: the token that follows, or -100;
            segment_lengths, only with `reset_attention_mask`: tokens of each document, summing to seq_length.
        """
        epoch, position = self._locate(index)
        pieces = self._window(epoch, position * self.seq_length)
        tokens = np.concatenate(pieces).astype(np.int64)
        sample = {"input_ids": tokens[:-1], "labels": tokens[1:].copy()}
        if self.reset_attention_mask:
            lengths = [len(piece) for piece in pieces]
            starts = np.cumsum(lengths)[:-1]
            sample["labels"][starts - 1] = IGNORE_INDEX
            lengths[-1] -= 1  # the window's last token is only a label
            sample["segment_lengths"] = [length for length in lengths if length]
        return sample

    def _window(self, epoch: int, first: int) -> list[np.ndarray]:
        """Tokens [first, first + seq_length + 1) of the epoch's stream, one array per document."""
        documents, bounds = self._streams(epoch)
        last = first + self.seq_length + 1
        number = int(np.searchsorted(bounds, first, side="right")) - 1
        pieces = []
        while bounds[number] < last:
            start = max(first - int(bounds[number]), 0)
            stop = min(last, int(bounds[number + 1])) - int(bounds[number])
            if stop > start:  # empty documents are possible in foreign files
                pieces.append(self.reader.slice(int(documents[number]), start, stop))
            number += 1
            if number == len(documents):
                break
        return pieces


def _open_stream(prefix: str | Path) -> tuple[str, DataRecord | None]:
    """(path of the one stream, its record or None for files of another program)."""
    found = find_dataset(prefix)
    if found is None:
        path = str(prefix).removesuffix(".bin").removesuffix(".idx")
        if "_packed_" in path or Path(f"{path}_packed_input_ids_document.idx").exists():
            raise UserError(
                f"data: '{prefix}' was built for fine-tuning (_packed_), not pre-training; try: posttrain_gpt.py"
            )
        return path, None
    base, streams = found
    record = read_record(base)
    if record.stage != "pretrain":
        raise UserError(
            f"data: '{base}' was built for fine-tuning by {record.handler}, but this is pre-training; try: "
            "posttrain_gpt.py, or preprocess with GeneralPretrainHandler"
        )
    if len(streams) != 1:
        raise UserError(
            f"data: '{base}' has several streams; legal: one of {', '.join(f'{base}_{s}' for s in streams)}"
        )
    return f"{base}_{streams[0]}", record
