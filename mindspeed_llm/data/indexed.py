"""Megatron's indexed token files: `<prefix>.bin` holds the tokens, `<prefix>.idx` the lengths and offsets.

Layout of the .idx file (little endian; megatron/core/datasets/indexed_dataset.py of megatron-core 0.16 reads it):
9 bytes magic, uint64 version 1, uint8 dtype code, uint64 number of sequences, uint64 number of document bounds,
int32 length of each sequence in tokens, int64 byte offset of each sequence, int64 document bounds (in sequences).
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from mindspeed_llm.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPE_CODES = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype(np.int16),
    4: np.dtype(np.int32),
    5: np.dtype(np.int64),
    6: np.dtype(np.float64),
    7: np.dtype(np.float32),
    8: np.dtype(np.uint16),
}
CODE_OF_DTYPE = {dtype: code for code, dtype in DTYPE_CODES.items()}
# megatron-core's DType.optimal_dtype: below this vocabulary size tokens are stored as uint16.
UINT16_VOCABULARY = 65500
COPY_BYTES = 16 << 20


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype Megatron chooses for pre-training tokens. Never for labels: uint16 turns -100 into 65436."""
    return np.dtype(np.uint16 if vocab_size < UINT16_VOCABULARY else np.int32)


def bin_path(prefix: str | Path) -> Path:
    """`<prefix>.bin`."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """`<prefix>.idx`."""
    return Path(f"{prefix}.idx")


class IndexedWriter:
    """Writes one stream of sequences, one document per sequence, under temporary names until `publish`.

    Args:
        prefix: final path without extension; its directory is created.
        dtype: dtype of the stored tokens.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype | type) -> None:
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype)
        if self.dtype not in CODE_OF_DTYPE:
            raise ValueError(f"indexed file: dtype {self.dtype} has no code; legal: {sorted(map(str, CODE_OF_DTYPE))}")
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self.temporary_prefix = self.prefix.with_name(f".{self.prefix.name}.tmp-{os.getpid()}")
        self._stream = open(bin_path(self.temporary_prefix), "wb", buffering=1 << 20)
        self._lengths: list[np.ndarray] = []
        self._document_bounds: list[np.ndarray] = [np.zeros(1, np.int64)]
        self.num_sequences = 0
        self.num_tokens = 0

    def add(self, tokens: np.ndarray, lengths: Sequence[int] | np.ndarray | None = None) -> None:
        """Append sequences.

        Args:
            tokens: [t] tokens of the sequences, one after another.
            lengths: tokens of each sequence, summing to t; None means one sequence.

        Raises:
            ValueError: the lengths do not add up, or a value does not fit the dtype.
        """
        lengths = np.asarray([len(tokens)] if lengths is None else lengths, dtype=np.int32)
        self._write(tokens, lengths, np.arange(1, len(lengths) + 1))

    def _write(self, tokens: np.ndarray, lengths: np.ndarray, document_ends: np.ndarray) -> None:
        tokens = np.asarray(tokens)
        if int(lengths.sum(dtype=np.int64)) != len(tokens):
            raise ValueError(f"indexed file: lengths sum to {lengths.sum(dtype=np.int64)}, but {len(tokens)} tokens")
        if tokens.dtype != self.dtype and len(tokens):
            info = np.iinfo(self.dtype)
            if tokens.min() < info.min or tokens.max() > info.max:
                raise ValueError(f"indexed file: values {tokens.min()}..{tokens.max()} do not fit {self.dtype}")
        self._stream.write(tokens.astype(self.dtype, copy=False).tobytes())
        self._document_bounds.append(self.num_sequences + np.asarray(document_ends, np.int64))
        self._lengths.append(lengths)
        self.num_sequences += len(lengths)
        self.num_tokens += len(tokens)

    def add_file(self, prefix: str | Path) -> None:
        """Append all sequences of another indexed file, keeping its document bounds.

        Raises:
            UserError: the other file stores another dtype.
        """
        other = IndexedReader(prefix)
        if other.dtype != self.dtype:
            raise UserError(
                f"merge: '{prefix}' stores {other.dtype}, because it was made with another vocabulary or stream; "
                f"legal: {self.dtype} as in the first file; try: preprocess all parts with the same tokenizer"
            )
        self._stream.flush()
        with open(bin_path(prefix), "rb") as source:
            shutil.copyfileobj(source, self._stream, COPY_BYTES)
        self._lengths.append(np.array(other.lengths))
        self._document_bounds.append(self.num_sequences + np.array(other.document_bounds[1:]))
        self.num_sequences += len(other)
        self.num_tokens += other.num_tokens

    def close(self) -> None:
        """Finish both files, still under their temporary names."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        lengths = np.concatenate([np.zeros(0, np.int32), *self._lengths])
        offsets = np.zeros(len(lengths), np.int64)
        np.cumsum(lengths[:-1], dtype=np.int64, out=offsets[1:])
        bounds = np.concatenate(self._document_bounds)
        with open(idx_path(self.temporary_prefix), "wb") as stream:
            stream.write(MAGIC + struct.pack("<QB", VERSION, CODE_OF_DTYPE[self.dtype]))
            stream.write(struct.pack("<QQ", len(lengths), len(bounds)))
            stream.write(lengths.tobytes() + (offsets * self.dtype.itemsize).tobytes() + bounds.tobytes())
            stream.flush()
            os.fsync(stream.fileno())

    def publish(self) -> None:
        """Give both (closed) files their final names, replacing older ones."""
        os.replace(bin_path(self.temporary_prefix), bin_path(self.prefix))
        os.replace(idx_path(self.temporary_prefix), idx_path(self.prefix))

    def discard(self) -> None:
        """Remove the temporary files."""
        self._stream.close()
        bin_path(self.temporary_prefix).unlink(missing_ok=True)
        idx_path(self.temporary_prefix).unlink(missing_ok=True)


class IndexedReader:
    """Random access to the sequences of an indexed file through memory maps.

    Attributes:
        lengths: [n] int32, tokens of each sequence.
        document_bounds: [documents + 1] int64, in sequences.
        num_tokens: tokens of all sequences.

    Raises:
        UserError: a file is missing, is not an indexed file, or the .bin does not have the size the .idx says.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        for path in (idx_path(prefix), bin_path(prefix)):
            if not path.is_file():
                raise UserError(f"data: '{path}' does not exist; try: the prefix that preprocess_data.py printed")
        self._map()

    def _map(self) -> None:
        path = idx_path(self.prefix)
        head = path.open("rb").read(34)
        if len(head) < 34 or head[:9] != MAGIC or struct.unpack_from("<Q", head, 9)[0] != VERSION:
            raise UserError(
                f"data: '{path}' is no index of version 1, because its header differs; try: preprocess again"
            )
        self.dtype = DTYPE_CODES.get(head[17])
        num_sequences, num_bounds = struct.unpack_from("<QQ", head, 18)
        if self.dtype is None or path.stat().st_size < 34 + 12 * num_sequences + 8 * num_bounds:
            raise UserError(f"data: '{path}' is cut short or has an unknown dtype; try: preprocess again")
        # Read, not mapped: after an odd number of int32 lengths the offsets would be unaligned.
        self.lengths = np.fromfile(path, np.int32, num_sequences, offset=34)
        self._offsets = np.fromfile(path, np.int64, num_sequences, offset=34 + 4 * num_sequences)
        self.document_bounds = np.fromfile(path, np.int64, num_bounds, offset=34 + 12 * num_sequences)
        self.num_tokens = int(self.lengths.sum(dtype=np.int64))
        size = bin_path(self.prefix).stat().st_size
        if size != self.num_tokens * self.dtype.itemsize:
            raise UserError(
                f"data: '{bin_path(self.prefix)}' has {size} bytes, because writing was cut off or the pair does not "
                f"belong together; legal: {self.num_tokens * self.dtype.itemsize} bytes; try: preprocess again"
            )
        self._tokens = np.memmap(bin_path(self.prefix), self.dtype, "r") if size else np.zeros(0, self.dtype)

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        """A copy of sequence `index`, [length] in the stored dtype."""
        return self.slice(index, 0, int(self.lengths[index]))

    def slice(self, index: int, start: int, stop: int) -> np.ndarray:
        """A copy of tokens [start, stop) of sequence `index`."""
        first = int(self._offsets[index]) // self.dtype.itemsize
        return np.array(self._tokens[first + start : first + stop])

    def __getstate__(self) -> dict:
        return {"prefix": self.prefix}

    def __setstate__(self, state: dict) -> None:
        self.prefix = state["prefix"]
        self._map()


def remove(prefix: str | Path) -> None:
    """Delete the pair of files if it is there."""
    idx_path(prefix).unlink(missing_ok=True)
    bin_path(prefix).unlink(missing_ok=True)


def natural_key(path: str | Path) -> list[tuple[int, int, str]]:
    """Sort key by which part 10 comes after part 2."""
    pieces = re.split(r"(\d+)", str(path))
    return [(1, int(piece), piece) if piece.isdigit() else (0, 0, piece) for piece in pieces]


def merge(prefixes: Iterable[str | Path], output_prefix: str | Path) -> int:
    """Concatenate indexed files in the given order.

    Returns:
        Number of sequences written.

    Raises:
        UserError: there is no input or the dtypes differ.
    """
    prefixes = list(prefixes)
    if not prefixes:
        raise UserError(
            f"merge: nothing to merge into '{output_prefix}'; try: --merge-group-keys that occur in the names"
        )
    writer = IndexedWriter(output_prefix, IndexedReader(prefixes[0]).dtype)
    try:
        for prefix in prefixes:
            writer.add_file(prefix)
        writer.close()
        writer.publish()
    except BaseException:
        writer.discard()
        raise
    return writer.num_sequences


def fingerprint(prefixes: Iterable[str | Path]) -> str:
    """Hex digest over the .idx files and the .bin sizes and edges of several indexed files: changes with the data."""
    digest = hashlib.sha256()
    for prefix in prefixes:
        with open(idx_path(prefix), "rb") as stream:
            while block := stream.read(COPY_BYTES):
                digest.update(block)
        size = bin_path(prefix).stat().st_size
        digest.update(struct.pack("<Q", size))
        with open(bin_path(prefix), "rb") as stream:
            digest.update(stream.read(1 << 20))
            stream.seek(max(0, size - (1 << 20)))
            digest.update(stream.read(1 << 20))
    return digest.hexdigest()
