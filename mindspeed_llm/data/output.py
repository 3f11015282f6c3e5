"""The indexed files of one preprocessing run: plain documents, or samples that may be packed into rows."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mindspeed_llm.data.handlers import Handler
from mindspeed_llm.data.indexed import IndexedReader, IndexedWriter
from mindspeed_llm.data.packing import pack
from mindspeed_llm.data.record import IGNORE_INDEX, SFT_STREAMS, sft_stream
from mindspeed_llm.data.tokenizer import Tokenizer
from mindspeed_llm.errors import UserError


class PretrainOutput:
    """One indexed file per column."""

    def __init__(self, prefix: str, handler: Handler) -> None:
        self.writers = {s: IndexedWriter(f"{prefix}_{s}", dtype) for s, dtype in handler.stream_dtypes.items()}

    def add(self, streams: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        """Append a chunk; returns the lengths of its documents."""
        for stream, (tokens, lengths) in streams.items():
            self.writers[stream].add(tokens, lengths)
        return np.concatenate([lengths for _, lengths in streams.values()])

    def finish(self) -> None:
        """Close all files."""
        for writer in self.writers.values():
            writer.close()

    def publish(self) -> None:
        """Give all files their final names."""
        for writer in self.writers.values():
            writer.publish()

    def discard(self) -> None:
        """Remove what was not published."""
        for writer in self.writers.values():
            writer.discard()


class SFTOutput(PretrainOutput):
    """input_ids, attention_mask and labels of samples, or of rows packed from them.

    attention_mask holds the number (from 1) of the segment a token belongs to, 0 for padding. Packed rows are padded to
    seq_length, as MindSpeed-LLM writes them.
    """

    def __init__(self, prefix: str, tokenizer: Tokenizer, seq_length: int | None, pack_mode: str) -> None:
        self.writers = {name: IndexedWriter(f"{prefix}_{sft_stream(name)}", np.int32) for name in SFT_STREAMS}
        self.seq_length = seq_length
        self.pad = tokenizer.pad_token_id
        self.samples: dict[str, IndexedWriter] = {}
        if pack_mode != "none":
            if self.pad is None:
                raise UserError(f"pack: '{tokenizer.source}' has neither pad nor eos to fill rows with; try: no --pack")
            self.samples = {n: IndexedWriter(f"{prefix}_unpacked_{n}", np.int32) for n in ("input_ids", "labels")}

    def add(self, streams: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        """Append a chunk; returns the lengths of its samples."""
        tokens, lengths = streams["input_ids"]
        for name, writer in (self.samples or self.writers).items():
            values = np.ones_like(tokens) if name == "attention_mask" else streams[name][0]
            writer.add(values, lengths)
        return lengths

    def finish(self) -> int | None:
        """Pack if asked to, close all files; returns the number of packed rows."""
        if not self.samples:
            super().finish()
            return None
        for writer in self.samples.values():
            writer.close()
        ids, labels = (IndexedReader(writer.temporary_prefix) for writer in self.samples.values())
        rows = pack(ids.lengths, self.seq_length)
        for row in rows:
            lengths = ids.lengths[row]
            room = self.seq_length - int(lengths.sum())
            pieces = {
                "input_ids": [*(ids[i] for i in row), np.full(room, self.pad, np.int32)],
                "labels": [*(labels[i] for i in row), np.full(room, IGNORE_INDEX, np.int32)],
                "attention_mask": [np.repeat(np.arange(1, len(row) + 1), lengths), np.zeros(room, np.int32)],
            }
            for name, writer in self.writers.items():
                writer.add(np.concatenate(pieces[name]))
        for writer in self.samples.values():
            writer.discard()
        super().finish()
        return len(rows)

    def discard(self) -> None:
        """Remove what was not published."""
        for writer in self.samples.values():
            writer.discard()
        super().discard()
