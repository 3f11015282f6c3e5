"""Reading the weights of a megatron-core `torch_dist` checkpoint without megatron or a process group.

megatron-core saves through torch.distributed.checkpoint: `.metadata` says which file holds which box of which global
tensor. Layers are stacked along a first axis (`decoder.layers.mlp.linear_fc1.weight` [layers, 2f, h]) unless the model
was heterogeneous; fc1 is [gate; up]; the vocabulary is padded.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mindspeed_llm.checkpoint.names import OUTPUT_LAYER, is_extra_state, plain_name
from mindspeed_llm.checkpoint.source import (
    TensorSource,
    check_dims,
    check_names,
    packed_range,
    unpack_groups,
)
from mindspeed_llm.checkpoint.stored_boxes import StoredBoxes
from mindspeed_llm.errors import UserError
from mindspeed_llm.models import layouts
from mindspeed_llm.models.shape import ModelShape

_NUMBERED = re.compile(r"decoder\.layers\.\d+\.")
_STACKED = "decoder.layers."
# what megatron-core calls all experts of a layer, stacked along an axis (after the layers' axis, if there is one)
_EXPERTS = ".experts.experts."
# entries of a training state that are no model weights
_TRAINING_STATE = re.compile(r"(chained_\d+\.|optimizer\b|opt_param_scheduler|rng_state|rerun_state_machine)")


@dataclass(frozen=True)
class _Stored:
    """Where a model tensor lies: the global tensor's key, and its place along the axes it is stacked along.

    Attributes:
        stack: its layer, its expert, both or neither.
    """

    key: str
    stack: tuple[int, ...]


class TorchDistSource(TensorSource):
    """The mcore tensors of a torch_dist checkpoint directory.

    Args:
        directory: the iter_XXXXXXX directory, with `.metadata` and *.distcp files.
        shape: of the model, from our record or from an HF config.

    Raises:
        UserError: the metadata is damaged, or the tensors are not this model's.
    """

    def __init__(self, directory: str | Path, shape: ModelShape) -> None:
        super().__init__(shape, str(directory))
        self._boxes = StoredBoxes(directory)
        self._stored = self._find_tensors()
        self._check()

    def dtype(self, name: str) -> torch.dtype:
        return self._boxes.dtype(self._stored[name].key)

    def read_part(self, name: str, part: int, start: int, stop: int) -> Tensor:
        pair = self.pairs[name]
        first, last, groups = packed_range(pair, self.shape, part, start, stop)
        box = [(0, size) for size in pair.dims]
        box[pair.layout.tp_dim or 0] = (first, last)
        block = self._read_box(name, box)
        return unpack_groups(block, self.shape, groups, part) if groups else block

    def read(self, name: str) -> Tensor:
        """The whole tensor, in one pass over its stored boxes (parts would read them once each)."""
        return self._read_box(name, [(0, size) for size in self.dims(name)])

    def read_shard(self, name: str, rank: int, tp: int, padded_vocab: int | None = None) -> Tensor:
        """As the base class; the interleaved q, k, v of a rank are contiguous rows and read in one pass."""
        if self.pairs[name].layout.packing != "qkv":
            return super().read_shard(name, rank, tp, padded_vocab)
        layouts.check_tensor_parallel(self.shape, tp)
        rows, *rest = self.dims(name)
        return self._read_box(name, [layouts.shard_range(rows, rank, tp), *((0, size) for size in rest)])

    def _find_tensors(self) -> dict[str, _Stored]:
        stored: dict[str, _Stored] = {}
        for key in self._boxes.tensors:
            if is_extra_state(key.split("/")[0]) or _TRAINING_STATE.match(key):
                continue
            size = self._boxes.shape(key)
            by_layer: dict[str, tuple[int, ...]] = {key: ()}
            if key.startswith(_STACKED) and not _NUMBERED.match(key):
                rest = key.removeprefix(_STACKED)
                by_layer = {f"{_STACKED}{layer}.{rest}": (layer,) for layer in range(size[0])}
            for name, stack in by_layer.items():
                if _EXPERTS not in name:
                    stored[plain_name(name)] = _Stored(key, stack)
                    continue
                for expert in range(size[len(stack)]):
                    one = name.replace(_EXPERTS, f".experts.local_experts.{expert}.")
                    stored[one] = _Stored(key, (*stack, expert))
        return stored

    def _check(self) -> None:
        if self.shape.tie_word_embeddings and OUTPUT_LAYER in self._stored:
            raise UserError(
                f"checkpoint: {self.origin} holds {OUTPUT_LAYER}, so its embeddings are not tied, but the model's "
                f"config says that they are"
            )
        check_names(list(self.pairs), list(self._stored), self.origin)
        for name, pair in self.pairs.items():
            found, expected = self._found_dims(name), list(pair.dims)
            if pair.layout.packing == "vocab":
                layouts.vocab_range(self.shape.vocab_size, found[0], 0, 1)
                expected[0] = found[0]
            check_dims(name, expected, found, self.origin)

    def _found_dims(self, name: str) -> tuple[int, ...]:
        stored = self._stored[name]
        return self._boxes.shape(stored.key)[len(stored.stack) :]

    def _read_box(self, name: str, box: Sequence[tuple[int, int]]) -> Tensor:
        """A box [start, stop) per dimension of one tensor, put together from the stored boxes that overlap it."""
        stored = self._stored[name]
        out = torch.empty([1] * len(stored.stack) + [stop - start for start, stop in box], dtype=self.dtype(name))
        covered = self._boxes.read(stored.key, [*stored.stack, *(start for start, _ in box)], out)
        if covered != out.numel():
            raise UserError(
                f"checkpoint: {name} in {self.origin} covers {covered} of {out.numel()} values; it is incomplete; try: "
                "another --ckpt-step, or copy it again"
            )
        return out[(0,) * len(stored.stack)]
