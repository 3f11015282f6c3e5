"""What a conversion tells: memory and disk that it takes, how far it is, what it read."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from mindspeed_llm.checkpoint.source import TensorSource
from mindspeed_llm.errors import UserError

Dtypes = dict[str, torch.dtype]
Say = Callable[[str], None]

# What one tensor needs at its worst: its parts, packed, and cast or cut. A 1.1B model in bf16 (largest tensor 125 MiB)
# was measured at 507 MiB of anonymous memory, 147 MiB of it Python and torch.
_COPIES = 3
_BASE_BYTES = 150 * 2**20


def announce(source: TensorSource, dtypes: Dtypes, disk: int, target: Path, merges: bool, say: Say) -> None:
    """Print what the conversion will take, and refuse to start when the disk cannot hold it.

    Args:
        dtypes: types that are written, by mcore name.
        disk: bytes that will be written.
        merges: a transform computes in fp32 on the way.

    Raises:
        UserError: the disk has less room.
    """
    widest = {n: max(source.dtype(n).itemsize, dtypes[n].itemsize, 4 if merges else 0) for n in source.names()}
    largest = max(torch.Size(source.dims(n)).numel() * widest[n] for n in source.names())
    memory = _BASE_BYTES + _COPIES * largest
    say(f"converting {source.origin}: peak memory about {_gib(memory)}, disk {_gib(disk)}")
    existing = next(parent for parent in (target, *target.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if disk > free:
        raise UserError(f"convert: {target} needs {_gib(disk)} but {_gib(free)} are free; try: another --save-dir")


def summary(source: TensorSource, dtypes: Dtypes) -> str:
    """The line that says what was read, and in which types it was written."""
    count = len(source.names())
    kinds = ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes.values()}))
    return f"loaded {count}/{count} tensors, {source.shape.num_parameters()} parameters from {source.origin} ({kinds})"


def progress(items: Sequence) -> Iterator:
    """The items, with a bar on a terminal."""
    console = Console(file=sys.stderr)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        yield from bar.track(items, description="tensors")


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
