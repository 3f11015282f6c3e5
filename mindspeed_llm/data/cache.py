"""Raw `--data-path`: preprocessed once into a cache, keyed by what the data and the settings are."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mindspeed_llm
from mindspeed_llm.data.indexed import idx_path
from mindspeed_llm.data.preprocess import preprocess_input, preprocess_settings
from mindspeed_llm.data.record import find_dataset, record_path
from mindspeed_llm.data.sources import find_files
from mindspeed_llm.data.templates import SHIPPED
from mindspeed_llm.errors import UserError

if TYPE_CHECKING:
    from mindspeed_llm.config.data import DataConfig
    from mindspeed_llm.data.tokenizer import Tokenizer

EDGE_BYTES = 1 << 20
DEFAULT_DIRECTORY = "~/.cache/mindspeed_llm"


def default_cache_dir() -> Path:
    """`$MINDSPEED_LLM_CACHE`, or ~/.cache/mindspeed_llm."""
    return Path(os.environ.get("MINDSPEED_LLM_CACHE") or DEFAULT_DIRECTORY).expanduser()


def is_preprocessed(path: str | Path) -> bool:
    """Whether a data path names indexed files rather than raw data."""
    if find_dataset(path) is not None:
        return True
    stem = str(path).removesuffix(".bin").removesuffix(".idx")
    return idx_path(stem).is_file() or idx_path(f"{stem}_packed_input_ids_document").is_file()


def preprocess_cached(
    data: DataConfig, tokenizer: Tokenizer, cache_dir: str | Path | None = None, stage: str | None = None
) -> str:
    """The prefix of `data.data_path` in preprocessed form, built first if need be.

    Safe to call from several processes at once: one builds under a file lock, the others wait. Where nodes share no
    file system each builds its own copy of the same bytes.

    Args:
        data: `data_path` names one raw data set (several files of it are joined by commas); the other options as for
            preprocessing.
        tokenizer: the loaded tokenizer.
        cache_dir: default `data.cache_dir`, then `default_cache_dir()`.
        stage: see `preprocess_input`.

    Raises:
        UserError: preprocessing fails, or the cache's file system locks no files.
    """
    (source,) = data.data_path
    settings = {**preprocess_settings(data), "stage": stage}
    directory = Path(cache_dir or data.cache_dir or default_cache_dir()).expanduser()
    directory.mkdir(parents=True, exist_ok=True)
    key = cache_key(source, settings, tokenizer)
    prefix = directory / f"{_stem(source)}-{key[:16]}"
    asked = time.time()
    with _locked(prefix):
        # With overwrite, data that appeared while this process waited for the lock are new enough.
        fresh = record_path(prefix).exists() and (
            not data.overwrite_cache or record_path(prefix).stat().st_mtime >= asked
        )
        if not fresh:
            report = preprocess_input(
                source, str(prefix), tokenizer, **settings, workers=data.workers, overwrite=data.overwrite_cache
            )
            report.print()
    return str(prefix)


def cache_key(source: str, settings: dict[str, Any], tokenizer: Tokenizer) -> str:
    """Hex digest of everything that decides the output: data, settings, templates, tokenizer and our version."""
    digest = hashlib.sha256(mindspeed_llm.__version__.encode())
    template_file = Path(settings["prompt_type_path"] or SHIPPED)
    digest.update(template_file.read_bytes() if template_file.is_file() else b"")
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    digest.update(tokenizer.fingerprint().encode())
    digest.update(f"{tokenizer.pad_token_id}\0{tokenizer.chat_template}".encode())
    files = None if settings["hf_params"] else find_files(source)
    digest.update(source.encode() if files is None else b"")
    for file in files or []:
        digest.update(_file_identity(file))
    return digest.hexdigest()


def _file_identity(file: Path) -> bytes:
    """Name, size, modification time and both edges of a file: reading all of a large one would cost too much."""
    stat = file.stat()
    with open(file, "rb") as stream:
        edges = stream.read(EDGE_BYTES)
        stream.seek(max(0, stat.st_size - EDGE_BYTES))
        edges += stream.read(EDGE_BYTES)
    return f"{file.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode() + hashlib.sha256(edges).digest()


def _stem(source: str) -> str:
    name = Path(source.split(",")[0]).stem or "data"
    return "".join(c if c.isalnum() or c in "-." else "-" for c in name)[:40]


@contextmanager
def _locked(prefix: Path) -> Iterator[None]:
    """Hold the one lock of the processes that want this prefix.

    Raises:
        UserError: the file system has no locks.
    """
    with open(f"{prefix}.lock", "w") as stream:
        try:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"data: another process preprocesses to {prefix}; waiting for it", flush=True)
                fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError as error:  # Lustre mounted without flock, NFS without its lock service
            raise UserError(
                f"--cache-dir: {prefix.parent} cannot be used, because its file system locks no files "
                f"({error.strerror}), and several processes could preprocess to it at once; legal: a directory where "
                "flock works; try: one on a local disk, or preprocess_data.py and its --output-prefix as --data-path"
            ) from error
        yield
