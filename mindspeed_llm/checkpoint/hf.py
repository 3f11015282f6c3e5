"""Reading Hugging Face model directories: safetensors or .bin, sharded or single, one slice at a time."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from mindspeed_llm.checkpoint.hf_nf4 import BESIDE, STATE, parse_state, quantized_weights, read_matrix
from mindspeed_llm.checkpoint.names import EMBEDDING, OUTPUT_LAYER
from mindspeed_llm.checkpoint.source import (
    TIED,
    TensorSource,
    check_dims,
    check_equal,
    check_names,
    check_one_dtype,
    holds_parts,
    packed_range,
    part_sizes,
    rows_of_part,
    unpack_groups,
)
from mindspeed_llm.errors import UserError
from mindspeed_llm.models.families.llama import HF_LAYER
from mindspeed_llm.models.family import get_family
from mindspeed_llm.models.hf_config import prediction_field, read_hf_config, shape_from_hf
from mindspeed_llm.models.mapping import absent_rules
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.ops.nf4_matrix import Nf4Matrix

_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class HfFiles:
    """The tensors of a Hugging Face directory by name, opened lazily.

    Args:
        directory: holds model.safetensors, model-*.safetensors with an index, or the pytorch_model*.bin equivalents.

    Raises:
        UserError: no weights, several kinds of files without an index, or an index that disagrees with the files.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._safe: dict[Path, safe_open] = {}
        self._bins: dict[Path, dict[str, Tensor]] = {}
        self._where = self._locate()
        states = quantized_weights(self._where, str(directory))
        self._nf4 = {weight: parse_state(self._stored(key), weight, str(directory)) for weight, key in states.items()}
        """What is in NF4; everywhere but in `nf4` it looks like the dense weights that it stands for."""

    def names(self) -> tuple[str, ...]:
        """All tensor names in the files."""
        beside = {weight + end for weight in self._nf4 for end in BESIDE}
        return tuple(name for name in self._where if name not in beside and STATE not in name)

    def dims(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        if name in self._nf4:
            return self._nf4[name].dims
        file = self._where[name]
        if file.suffix == ".safetensors":
            return tuple(self._open_safe(file).get_slice(name).get_shape())
        return tuple(self._open_bin(file)[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Stored type.

        Raises:
            UserError: it is not a floating-point type that weights can have.
        """
        if name in self._nf4:
            return self._nf4[name].dtype
        file = self._where[name]
        if file.suffix != ".safetensors":
            return self._open_bin(file)[name].dtype
        stored = self._open_safe(file).get_slice(name).get_dtype()
        if stored not in _SAFETENSORS_DTYPES:
            raise UserError(
                f"checkpoint: {name} in {file} has type {stored}, which is no type of unquantised weights; legal: "
                f"{', '.join(_SAFETENSORS_DTYPES)}"
            )
        return _SAFETENSORS_DTYPES[stored]

    def read(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """[start, stop) along dimension 0 or 1 of a tensor."""
        if name in self._nf4:
            matrix, dtype = self.nf4(name), self.dtype(name)
            return matrix.cut(0, start, stop).dense(dtype) if dim == 0 else matrix.dense(dtype)[:, start:stop]
        file = self._where[name]
        tensor = self._open_safe(file).get_slice(name) if file.suffix == ".safetensors" else self._open_bin(file)[name]
        return tensor[start:stop] if dim == 0 else tensor[:, start:stop]

    @property
    def any_nf4(self) -> bool:
        """Whether some weight is in NF4."""
        return bool(self._nf4)

    def nf4(self, name: str) -> Nf4Matrix | None:
        """A weight that is stored in NF4, None for others.

        Raises:
            UserError: it is no matrix whose rows are whole blocks, or other tables were used.
        """
        if name not in self._nf4:
            return None
        return read_matrix(self._stored, name, self._nf4[name], str(self.directory))

    def _stored(self, name: str) -> Tensor:
        file = self._where[name]
        return self._open_safe(file).get_tensor(name) if file.suffix == ".safetensors" else self._open_bin(file)[name]

    def _open_safe(self, file: Path) -> safe_open:
        if file not in self._safe:
            try:
                self._safe[file] = safe_open(file, framework="pt")
            except Exception as error:  # SafetensorError is the library's own, raised for truncated files
                raise UserError(f"checkpoint: {file} cannot be read ({error}); try: copy it again") from error
        return self._safe[file]

    def _open_bin(self, file: Path) -> dict[str, Tensor]:
        if file not in self._bins:
            try:
                # files written before torch 1.6 are no zip archives and cannot be mapped
                self._bins[file] = torch.load(
                    file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True
                )
            except Exception as error:
                raise UserError(f"checkpoint: {file} cannot be read ({error}); try: copy it again") from error
        return self._bins[file]

    def _keys(self, file: Path) -> list[str]:
        return list(self._open_safe(file).keys() if file.suffix == ".safetensors" else self._open_bin(file))

    def _locate(self) -> dict[str, Path]:
        """name -> file, from the files themselves; an index must agree with them."""
        for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
            index = self.directory / f"{stem}.{suffix}.index.json"
            single = self.directory / f"{stem}.{suffix}"
            if index.is_file():
                return self._locate_by_index(index)
            if single.is_file():
                return dict.fromkeys(self._keys(single), single)
        found = sorted(p.name for p in self.directory.iterdir()) if self.directory.is_dir() else []
        raise UserError(
            f"checkpoint: no Hugging Face weights in {self.directory} (found: {', '.join(found[:8]) or 'nothing'}); "
            f"legal: model.safetensors, model.safetensors.index.json, pytorch_model.bin or its index"
        )

    def _locate_by_index(self, index: Path) -> dict[str, Path]:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        where: dict[str, Path] = {}
        for file_name in sorted(set(listed.values())):
            file = self.directory / file_name
            if not file.is_file():
                raise UserError(f"checkpoint: {index} names {file_name}, which is not there; try: copy it again")
            for key in self._keys(file):
                if key in where:
                    raise UserError(f"checkpoint: {key} is in {where[key].name} and in {file_name}")
                where[key] = file
        wrong = sorted(key for key in where.keys() | listed.keys() if listed.get(key) != _name(where.get(key)))
        if wrong:
            raise UserError(
                f"checkpoint: {index} disagrees with the files about {len(wrong)} tensors ({', '.join(wrong[:4])}); "
                f"try: copy the directory again"
            )
        return where


class HfSource(TensorSource):
    """The mcore tensors of a Hugging Face model directory.

    Args:
        directory: with config.json and weights.
        shape: what config.json describes; read from there when not given.

    Raises:
        UserError: tensors are missing, unexpected, of a wrong shape, or contradict config.json.
    """

    def __init__(self, directory: str | Path, shape: ModelShape | None = None) -> None:
        directory = Path(directory)
        super().__init__(shape or shape_from_hf(read_hf_config(directory)), str(directory))
        self.files = HfFiles(directory)
        self._check()

    def dtype(self, name: str) -> torch.dtype:
        return self.files.dtype(self.pairs[name].hf[0])

    @property
    def any_nf4(self) -> bool:
        return self.files.any_nf4

    def read_part(self, name: str, part: int, start: int, stop: int) -> Tensor:
        pair, dim = self.pairs[name], self.pairs[name].layout.tp_dim or 0
        if pair.transform == "parts":
            return self.files.read(pair.hf[part], dim, start, stop)
        if pair.transform == "concatenated":
            offset = sum(part_sizes(pair, self.shape)[:part])
            return self.files.read(pair.hf[0], dim, offset + start, offset + stop)
        first, last, groups = packed_range(pair, self.shape, part, start, stop)
        block = self.files.read(pair.hf[0], dim, first, last)
        return unpack_groups(block, self.shape, groups, part) if groups else block

    def read_nf4(self, name: str, part: int, start: int, stop: int, device: torch.device | None = None) -> Nf4Matrix:
        pair = self.pairs[name]
        matrix = self.files.nf4(pair.hf[part if pair.transform == "parts" else 0])
        if matrix is None:
            return super().read_nf4(name, part, start, stop, device)
        if holds_parts(pair, self.shape):
            matrix = matrix.rows(rows_of_part(pair, self.shape, part))
        return matrix.cut(pair.layout.tp_dim or 0, start, stop)

    def _check(self) -> None:
        family = get_family(self.shape.family)
        found = set(self.files.names())
        self._check_absent(found)
        buffers = {
            name.replace("{i}", str(i))
            for name in family.optional_tensors
            for i in range(self.shape.num_layers + self.shape.mtp_num_layers)
        }
        expected = [hf for pair in self.pairs.values() for hf in pair.hf]
        copies = self._check_copies(found)
        found = found - buffers - copies - self._left_out(found)
        check_names(expected, sorted(found), self.origin, self._about_prediction())
        for pair in self.pairs.values():
            for hf, dims in zip(pair.hf, pair.hf_dims):
                check_dims(hf, dims, self.files.dims(hf), self.origin)
            check_one_dtype(pair.mcore, [self.files.dtype(hf) for hf in pair.hf], self.origin)

    def _check_copies(self, found: set[str]) -> set[str]:
        """Names of tensors that HF stores again; each must be the same bits as the one that is read.

        Raises:
            UserError: a copy differs.
        """
        copies = {(copy, pair.hf[0]) for pair in self.pairs.values() for copy in pair.hf_copies if copy in found}
        for copy, original in sorted(copies):
            rows = self.shape.vocab_size
            check_dims(copy, self.files.dims(original), self.files.dims(copy), self.origin)
            check_equal(
                self.files.read(original, 0, 0, rows),
                self.files.read(copy, 0, 0, rows),
                f"{original} and {copy} in {self.origin}",
                "multi-token prediction shares them; try: --mtp-num-layers 0 to leave it out",
            )
        return {copy for copy, _ in copies}

    def _left_out(self, found: set[str]) -> set[str]:
        """Tensors of multi-token prediction layers that config.json counts and the shape, on purpose, does not."""
        stated = prediction_field(read_hf_config(self.files.directory))
        first = self.shape.num_layers + self.shape.mtp_num_layers
        last = self.shape.num_layers + (stated[1] if stated else 0)
        prefixes = tuple(HF_LAYER.replace("{i}", str(layer)) for layer in range(first, last))
        return {name for name in found if prefixes and name.startswith(prefixes)}

    def _about_prediction(self) -> str:
        """A hint for files that lack the multi-token prediction layers that config.json counts."""
        if not self.shape.mtp_num_layers:
            return ""
        return f"config.json counts {self.shape.mtp_num_layers} prediction layers; --mtp-num-layers 0 leaves them out"

    def _check_absent(self, found: set[str]) -> None:
        """Tensors that the shape rules out: a tied head must be a copy, anything else contradicts config.json."""
        for rule, hf_name in absent_rules(self.shape):
            if hf_name not in found:
                continue
            if rule.mcore != OUTPUT_LAYER:
                raise UserError(
                    f"checkpoint: {self.origin} holds {hf_name}, but config.json says that there is none; try: correct "
                    f"the bias or normalisation fields of config.json"
                )
            embedding, rows = self.pairs[EMBEDDING].hf[0], self.shape.vocab_size
            check_dims(hf_name, self.pairs[EMBEDDING].dims, self.files.dims(hf_name), self.origin)
            head = self.files.read(hf_name, 0, 0, rows)
            check_equal(
                self.files.read(embedding, 0, 0, rows), head, f"{embedding} and {hf_name} in {self.origin}", TIED
            )
            found.discard(hf_name)


def _name(path: Path | None) -> str | None:
    return path.name if path else None
