"""Raw data: files, directories and data set names become rows that know where they came from."""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindspeed_llm.data.hub import cached_only, endpoint, hub_answers
from mindspeed_llm.data.indexed import natural_key
from mindspeed_llm.data.json_array import array_rows
from mindspeed_llm.errors import UserError

EXTENSIONS = (".json", ".jsonl", ".parquet", ".csv", ".txt", ".arrow")
# What `datasets` writes beside its .arrow files.
METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
# A chunk is the unit of work of a process: many rows, so that batch encoding pays, but bounded memory.
CHUNK_ROWS = 1000
CHUNK_BYTES = 4 << 20
ARROW_BATCH = 1000
# Characters of a csv field. The csv module refuses more than 131072 unless told otherwise; a document may be longer.
LARGEST_FIELD = 2**31 - 1


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of one file.

    Args:
        file: the file or data set name, for messages.
        unit: "line" or "row": what `numbers` count, from 1.
        rows: dicts, or undecoded JSON text (bytes) which a worker parses.
        numbers: line or row number of each row.
        num_bytes: size of the rows in the source, as far as known.
    """

    file: str
    unit: str
    rows: list[Any]
    numbers: list[int]
    num_bytes: int

    def decode(self) -> Iterator[tuple[int, dict[str, Any] | UserError]]:
        """(number, row) of each row; a row that cannot be read is given as its error."""
        for number, row in zip(self.numbers, self.rows):
            if isinstance(row, bytes):
                try:
                    row = json.loads(row)
                except ValueError as error:  # JSONDecodeError or UnicodeDecodeError
                    yield number, UserError(f"not JSON ({error})")
                    continue
            if not isinstance(row, dict):
                yield number, UserError(f"a row is an object with columns, not {type(row).__name__}")
                continue
            if None in row:  # csv.DictReader collects what lies beyond the last column under None
                yield number, UserError("more fields than the header has columns")
                continue
            yield number, row

    def origin(self, number: int) -> str:
        """`file:number` as shown to the user."""
        return f"{self.file}:{number}"


def find_files(spec: str) -> list[Path] | None:
    """The files that `--input` names, directories expanded in numeric-aware order.

    Args:
        spec: a path, or several separated by commas.

    Returns:
        None if it is no path at all (it may be the name of a data set).

    Raises:
        UserError: some of several paths do not exist, a directory has no data, or a type is unknown.
    """
    paths = [Path(spec)] if Path(spec).exists() else [Path(piece.strip()) for piece in spec.split(",") if piece.strip()]
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        if len(paths) == 1 and paths[0].suffix not in EXTENSIONS and not paths[0].is_absolute():
            return None
        raise UserError(
            f"input: {', '.join(missing)} does not exist; legal: existing files or directories, or a data set"
        )
    files: list[Path] = []
    for path in paths:
        files += _directory_files(path) if path.is_dir() else [path]
    for path in files:
        if path.suffix not in EXTENSIONS:
            raise UserError(f"input: type of '{path}' is unknown; legal: {', '.join(EXTENSIONS)}")
    return files


def _directory_files(directory: Path) -> list[Path]:
    found = [path for path in directory.rglob("*") if path.is_file() and path.suffix in EXTENSIONS]
    found = [path for path in found if not any(part.startswith(".") for part in path.relative_to(directory).parts)]
    found = [path for path in found if path.name not in METADATA]
    if not found:
        raise UserError(f"input: directory '{directory}' has no data files; legal: {', '.join(EXTENSIONS)}")
    kinds = sorted({path.suffix.replace("jsonl", "json") for path in found})
    if len(kinds) > 1:
        raise UserError(
            f"input: directory '{directory}' mixes {', '.join(kinds)} files, so the data are not clear; legal: one "
            "type; try: the files themselves, separated by commas"
        )
    return sorted(found, key=lambda path: natural_key(path.relative_to(directory)))


def read_chunks(
    spec: str, max_samples: int | None = None, hf_params: dict[str, Any] | None = None, columns: list[str] | None = None
) -> Iterator[Chunk]:
    """Rows of a source in its order, in chunks.

    Args:
        spec: see `find_files`; otherwise a data set name for `datasets.load_dataset`.
        max_samples: stop after this many rows.
        hf_params: keyword arguments of `datasets.load_dataset`; gives `spec` to it even if it is a local directory.
        columns: the only columns that are needed, where the format can leave others unread.
    """
    files = None if hf_params else find_files(spec)
    if files is None:
        rows = _dataset_rows(spec, hf_params or {})
        yield from _limit(_chunk_rows(spec, "row", rows), max_samples)
        return
    yield from _limit((chunk for file in files for chunk in _file_chunks(file, columns)), max_samples)


def source_bytes(spec: str) -> int | None:
    """Total size of the rows, None where it is not known: for a data set name, and for compressed files."""
    files = find_files(spec)
    if files is None or any(file.suffix == ".parquet" for file in files):
        return None
    return sum(file.stat().st_size for file in files)


def _limit(chunks: Iterator[Chunk], max_samples: int | None) -> Iterator[Chunk]:
    left = max_samples
    for chunk in chunks:
        if left is not None and len(chunk.rows) >= left:
            yield Chunk(chunk.file, chunk.unit, chunk.rows[:left], chunk.numbers[:left], chunk.num_bytes)
            return
        left = None if left is None else left - len(chunk.rows)
        yield chunk


def _file_chunks(file: Path, columns: list[str] | None) -> Iterator[Chunk]:
    if file.suffix in (".parquet", ".arrow"):
        return _arrow_chunks(file, columns)
    if file.suffix == ".csv":
        return _chunk_numbered(file, "line", _in_utf8(file, _csv_rows(file)))
    if file.suffix == ".txt":
        return _chunk_numbered(file, "line", _in_utf8(file, _text_rows(file)))
    if file.suffix == ".json" and _first_character(file) == b"[":
        return _chunk_numbered(file, "line", _in_utf8(file, array_rows(file)))
    return _chunk_numbered(file, "line", _json_lines(file))


def _in_utf8(file: Path, rows: Iterator[tuple[int, Any, int]]) -> Iterator[tuple[int, Any, int]]:
    """The rows of a file that is read as text; where a byte of another encoding stands, rows cannot be told apart."""
    try:
        yield from rows
    except UnicodeDecodeError as error:
        raise UserError(
            f"input: '{file}' is not UTF-8, because of byte 0x{error.object[error.start]:02x} ({error.reason}); legal: "
            "UTF-8; try: iconv -f GB18030 -t UTF-8, or from the encoding that it has"
        ) from error


def _first_character(file: Path) -> bytes:
    with open(file, "rb") as stream:
        while block := stream.read(4096).removeprefix(b"\xef\xbb\xbf"):
            if block.strip():
                return block.strip()[:1]
    return b""


def _json_lines(file: Path) -> Iterator[tuple[int, bytes, int]]:
    with open(file, "rb", buffering=1 << 20) as stream:
        for number, line in enumerate(stream, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield number, line, len(line)


def _csv_rows(file: Path) -> Iterator[tuple[int, dict[str, Any], int]]:
    limit = csv.field_size_limit(LARGEST_FIELD)
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            first = 2  # the header is line 1
            for row in reader:
                yield first, row, sum(len(value) for value in row.values() if isinstance(value, str))
                first = reader.line_num + 1
    finally:
        csv.field_size_limit(limit)


def _text_rows(file: Path) -> Iterator[tuple[int, dict[str, Any], int]]:
    with open(file, encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield number, {"text": line.rstrip("\n")}, len(line)


def _arrow_chunks(file: Path, columns: list[str] | None) -> Iterator[Chunk]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if file.suffix == ".parquet":
            opened = pq.ParquetFile(file)
            wanted = None if columns is None else [c for c in columns if c in opened.schema_arrow.names] or None
            batches = opened.iter_batches(ARROW_BATCH, columns=wanted)
        else:
            batches = _arrow_batches(file)
        number = 1
        for batch in batches:
            rows = batch.to_pylist()
            yield Chunk(str(file), "row", rows, list(range(number, number + len(rows))), batch.nbytes)
            number += len(rows)
    except pa.ArrowInvalid as error:
        raise UserError(f"input: '{file}' cannot be read, because {error}") from error


def _arrow_batches(file: Path) -> Iterator[Any]:
    import pyarrow as pa

    with pa.memory_map(str(file)) as stream:
        try:
            opened = pa.ipc.open_stream(stream)
        except pa.ArrowInvalid:  # the file format, not the stream format that `datasets` writes
            opened = pa.ipc.open_file(stream)
            for index in range(opened.num_record_batches):
                yield from pa.Table.from_batches([opened.get_batch(index)]).to_batches(ARROW_BATCH)
            return
        for batch in opened:
            yield from pa.Table.from_batches([batch]).to_batches(ARROW_BATCH)


def _chunk_numbered(file: Path, unit: str, rows: Iterator[tuple[int, Any, int]]) -> Iterator[Chunk]:
    buffer: list[Any] = []
    numbers: list[int] = []
    size = 0
    for number, row, row_bytes in rows:
        buffer.append(row)
        numbers.append(number)
        size += row_bytes
        if len(buffer) >= CHUNK_ROWS or size >= CHUNK_BYTES:
            yield Chunk(str(file), unit, buffer, numbers, size)
            buffer, numbers, size = [], [], 0
    if buffer:
        yield Chunk(str(file), unit, buffer, numbers, size)


def _chunk_rows(name: str, unit: str, rows: Iterator[dict[str, Any]]) -> Iterator[Chunk]:
    numbered = ((number, row, len(str(row))) for number, row in enumerate(rows, 1))
    yield from _chunk_numbered(Path(name), unit, numbered)


def _dataset_rows(name: str, params: dict[str, Any]) -> Iterator[dict[str, Any]]:
    import datasets

    # Files of one's own, read by one of the builders of `datasets` ("json", "parquet"), need no hub.
    own_files = Path(name).exists() or ("/" not in name and bool(params.keys() & {"data_files", "data_dir"}))
    reachable = own_files or datasets.config.HF_HUB_OFFLINE or hub_answers()
    try:
        with contextlib.nullcontext() if reachable else cached_only():
            loaded = datasets.load_dataset(name, **{"split": "train", **params})
    except Exception as error:  # `datasets` raises a dozen types; the reason it gives is what helps
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if not reachable and isinstance(error, ConnectionError):
            reason = f"{endpoint()} does not answer and the cache does not have it"
        raise UserError(
            f"input: '{name}' is no path, and as a data set it could not be loaded, because {reason}; legal: a file, a "
            "directory, or a data set name while the hub is reachable; try: HF_ENDPOINT with a mirror, files that were "
            "downloaded elsewhere, or --hf-datasets-params for its configuration"
        ) from error
    if isinstance(loaded, dict):
        raise UserError(f"input: '{name}' gives several splits {sorted(loaded)}; try: 'split' in --hf-datasets-params")
    yield from loaded
