"""Writing Hugging Face model directories tensor by tensor, in shards, with an index made from what is on disk."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from mindspeed_llm.checkpoint.directory import ASIDE, former_of, swap_in
from mindspeed_llm.checkpoint.manifest import flush_directory, flush_tree
from mindspeed_llm.errors import UserError

SHARD_BYTES = 5_000_000_000
"""transformers' usual shard size."""

_INSIDE = ".incomplete"
_LAST = ("config.json",)
_DTYPE_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.uint8: "U8",
}


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written: HF name, shape and type."""

    name: str
    dims: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size of its data."""
        return torch.Size(self.dims).numel() * self.dtype.itemsize


class HfWriter:
    """Writes planned tensors in order; nothing is visible as a model before `finish`.

    A directory that is not there yet appears all at once. Into one that is there files are moved, config.json last.

    Args:
        directory: the model directory to make; must hold no weights yet.
        plan: all tensors, in the order in which they will be written.
        shard_bytes: data per file, exceeded only by a tensor that is larger on its own.
        replace: a model that is there stays until the new one is complete, and is removed then.
        notes: written into the head of every file (safetensors' metadata).

    Raises:
        UserError: the directory holds weights already.
    """

    def __init__(
        self,
        directory: Path,
        plan: Sequence[PlannedTensor],
        shard_bytes: int = SHARD_BYTES,
        replace: bool = False,
        notes: Mapping[str, str] | None = None,
    ) -> None:
        held = any(directory.glob("*.safetensors")) or any(directory.glob("pytorch_model*.bin"))
        if held and not replace:
            raise UserError(f"checkpoint: {directory} holds weights already; try: another --save-dir, or remove them")
        self.directory = directory
        self._as_a_whole = replace or not directory.exists()
        self._aside = directory.with_name(directory.name + ASIDE) if self._as_a_whole else directory / _INSIDE
        shutil.rmtree(self._aside, ignore_errors=True)
        self._aside.mkdir(parents=True)
        self._shards, self._notes = _shards(plan, shard_bytes), dict(notes or {})
        self._next = [(shard, tensor) for shard, tensors in enumerate(self._shards) for tensor in tensors]
        self._next.reverse()
        self._open_shard, self._file = -1, None

    def num_bytes(self) -> int:
        """Size of all tensors."""
        return sum(tensor.num_bytes for shard in self._shards for tensor in shard)

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next planned tensor, cast to its planned type."""
        shard, planned = self._next.pop()
        assert name == planned.name and tuple(tensor.shape) == planned.dims, (name, planned)
        if shard != self._open_shard:
            self._close_file()
            self._file = _start_file(self._aside / self._file_name(shard), self._shards[shard], self._notes)
            self._open_shard = shard
        data = tensor.to(planned.dtype).contiguous().view(-1).view(torch.uint8).numpy()
        self._file.write(memoryview(data))

    def finish(
        self, config_files: Path, dtype: torch.dtype | None = None, changes: Mapping[str, Any] | None = None
    ) -> None:
        """Add config and tokenizer, write the index, and move everything into place, config.json last where one by one.

        Args:
            config_files: directory to take config.json, tokenizer, generation config and chat template from.
            dtype: recorded in config.json when the weights were cast on purpose; None leaves it as it is.
            changes: other fields of config.json that the written tensors make wrong, with their new values; None takes
                a field away.
        """
        from mindspeed_llm.checkpoint.train_save import copy_hf_files

        assert not self._next, f"{len(self._next)} tensors were not written"
        self._close_file()
        if len(self._shards) > 1:
            self._write_index()
        copy_hf_files(config_files, self._aside)
        if dtype is not None:
            _record_dtype(self._aside / "config.json", dtype)
        if changes:
            _change_config(self._aside / "config.json", changes)
        flush_tree(self._aside)
        if self._as_a_whole:
            swap_in(self._aside, self.directory)
            shutil.rmtree(former_of(self.directory), ignore_errors=True)
            return
        for file in sorted(self._aside.iterdir(), key=lambda file: file.name in _LAST):
            os.replace(file, self.directory / file.name)
        self._aside.rmdir()
        flush_directory(self.directory)

    def discard(self) -> None:
        """Remove what was written, after a failure."""
        if self._file is not None:
            self._file.close()
        shutil.rmtree(self._aside, ignore_errors=True)

    def _file_name(self, shard: int) -> str:
        count = len(self._shards)
        return "model.safetensors" if count == 1 else f"model-{shard + 1:05d}-of-{count:05d}.safetensors"

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def _write_index(self) -> None:
        weight_map: dict[str, str] = {}
        for path in sorted(self._aside.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                weight_map.update(dict.fromkeys(file.keys(), path.name))
        index = {"metadata": {"total_size": self.num_bytes()}, "weight_map": dict(sorted(weight_map.items()))}
        (self._aside / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(plan: Sequence[PlannedTensor], shard_bytes: int) -> list[list[PlannedTensor]]:
    shards: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in plan:
        if shards[-1] and size + tensor.num_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.num_bytes
    return shards


def _start_file(path: Path, tensors: Sequence[PlannedTensor], notes: Mapping[str, str]) -> BinaryIO:
    """A file with the safetensors header: length (8 bytes, little endian), json padded to 8 bytes; data follows."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **notes}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.dims),
            "data_offsets": [offset, offset + tensor.num_bytes],
        }
        offset += tensor.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    file = path.open("wb")
    file.write(len(text).to_bytes(8, "little") + text)
    return file


def _record_dtype(path: Path, dtype: torch.dtype) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    field = "torch_dtype" if "torch_dtype" in config else "dtype"  # transformers 4 and 5
    _change_config(path, {field: str(dtype).removeprefix("torch.")})


def _change_config(path: Path, changes: Mapping[str, Any]) -> None:
    config = json.loads(path.read_text(encoding="utf-8")) | changes
    config = {name: value for name, value in config.items() if name not in changes or value is not None}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
