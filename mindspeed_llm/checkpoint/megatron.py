"""Reading Megatron checkpoints of mp_rank files, ours or foreign, mapped into memory and without running their pickles.

<dir>/latest_checkpointed_iteration.txt
<dir>/iter_0000001/mp_rank_<tp>[_<pp>]/model_optim_rng.pt    {"model" or "model0".., "args", "iteration", ...}
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mindspeed_llm.checkpoint.megatron_args import ARGS_THAT_CHANGE_OUTPUTS, megatron_args
from mindspeed_llm.checkpoint.names import EMBEDDING, OUTPUT_LAYER, is_extra_state, plain_name
from mindspeed_llm.checkpoint.source import TIED, TensorSource, check_dims, check_equal, check_names, check_one_dtype
from mindspeed_llm.errors import UserError
from mindspeed_llm.models import layouts
from mindspeed_llm.models.mapping import TensorPair
from mindspeed_llm.models.shape import ModelShape

FILE_NAME = "model_optim_rng.pt"
EMBEDDING_AGAIN = "last stage's " + EMBEDDING
Place = tuple[int, str, str]
"""(pipeline stage, key of the model chunk in the file, name in the chunk)"""
_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")


class _Opaque:
    """Stands for an object of a class that only the writing program knows; nothing of that class is executed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


def rank_directory_name(tp_rank: int, pp_rank: int, pp: int) -> str:
    """`mp_rank_01` without pipeline parallelism, else `mp_rank_01_003`."""
    return f"mp_rank_{tp_rank:02d}" + (f"_{pp_rank:03d}" if pp > 1 else "")


def load_rank_file(path: Path) -> dict[str, Any]:
    """The dictionary in one rank's file; tensors are mapped, not read.

    Classes that torch does not vouch for become placeholders, so a checkpoint cannot run code.

    Raises:
        UserError: the file is truncated or no torch file.
    """
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        allowed = [
            argparse.Namespace if name == "argparse.Namespace" else (type("Opaque", (_Opaque,), {}), name)
            for name in unknown
        ]
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # pickle, zip and torch raise a dozen types for damaged files
        raise UserError(f"checkpoint: {path} cannot be read ({error}); it may be incomplete") from error


class RankFiles:
    """The files of all tensor and pipeline ranks of one iteration.

    Args:
        directory: the iter_XXXXXXX (or release) directory.

    Attributes:
        tp, pp: sizes found.
        places: global mcore name -> (pp_rank, model key, name in the file). Layers are numbered in forward order
            (chunk by chunk, stage by stage), which needs no record of the split and skips no-op layers.

    Raises:
        UserError: rank directories are missing, or the layout is not a plain pipeline.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tp, self.pp = _sizes(directory)
        self._content: dict[tuple[int, int], dict[str, Any]] = {}
        self._check_schedule()
        self.places = self._number_layers()
        self._check_ranks_agree()

    def content(self, tp_rank: int, pp_rank: int) -> dict[str, Any]:
        """One rank's dictionary."""
        key = (tp_rank, pp_rank)
        if key not in self._content:
            name = rank_directory_name(tp_rank, pp_rank, self.pp)
            directory = self.directory / name
            if self.pp == 1 and not directory.is_dir():
                directory = self.directory / f"{name}_000"
            self._content[key] = load_rank_file(directory / FILE_NAME)
        return self._content[key]

    def tensors(self, name: str) -> list[Tensor]:
        """All tensor-parallel ranks' tensors of one mcore name, in rank order."""
        pp_rank, key, stored = self.places[name]
        return [self.content(rank, pp_rank)[key][stored] for rank in range(self.tp)]

    def args(self) -> Mapping[str, Any]:
        """Arguments of the program that wrote the checkpoint; empty when there are none."""
        args = self.content(0, 0).get("args")
        return vars(args) if isinstance(args, argparse.Namespace) else {}

    def model_keys(self, tp_rank: int, pp_rank: int) -> list[str]:
        """ "model", or "model0", "model1", ... in order."""
        content = self.content(tp_rank, pp_rank)
        if "model" in content:
            return ["model"]
        keys = []
        while f"model{len(keys)}" in content:
            keys.append(f"model{len(keys)}")
        if not keys:
            raise UserError(
                f"checkpoint: {self.directory} rank {tp_rank}, stage {pp_rank} holds no 'model' (found: "
                f"{', '.join(map(str, content)) or 'nothing'})"
            )
        return keys

    def _check_schedule(self) -> None:
        if self.args().get("schedules_method") == "dualpipev":
            raise UserError(
                f"checkpoint: {self.directory} was written for schedules-method dualpipev, whose layer order is not "
                f"implemented; legal: plain or interleaved pipeline"
            )

    def _number_layers(self) -> dict[str, Place]:
        keys = [self.model_keys(0, p) for p in range(self.pp)]
        if len({len(k) for k in keys}) > 1:
            raise UserError(f"checkpoint: stages of {self.directory} have different numbers of model chunks")
        places: dict[str, Place] = {}
        next_layer = 0
        for v in range(len(keys[0])):
            for p in range(self.pp):
                next_layer = self._number_chunk(p, keys[p][v], next_layer, places)
        return places

    def _number_chunk(self, pp_rank: int, key: str, next_layer: int, places: dict[str, Place]) -> int:
        """Add the tensors of one model chunk; returns the number that its successor's first layer gets."""
        stored_names = [name for name in self.content(0, pp_rank)[key] if not is_extra_state(name)]
        slots = sorted({i for name in stored_names if (i := layouts.layer_index(name)) is not None})
        for stored in stored_names:
            name, slot = plain_name(stored), layouts.layer_index(stored)
            if slot is not None:
                name = layouts.with_layer(name, next_layer + slots.index(slot))
            if name == EMBEDDING and name in places:
                name = EMBEDDING_AGAIN
            if name in places:
                raise UserError(
                    f"checkpoint: {name} is twice in {self.directory}, in stages {places[name][0]}, {pp_rank}"
                )
            places[name] = (pp_rank, key, stored)
        return next_layer + len(slots)

    def _check_ranks_agree(self) -> None:
        for p in range(self.pp):
            first = {(k, n) for k in self.model_keys(0, p) for n in self.content(0, p)[k] if not is_extra_state(n)}
            for rank in range(1, self.tp):
                content = self.content(rank, p)
                keys = self.model_keys(rank, p)
                names = [f"{k}.{n}" for k in keys for n in content[k] if not is_extra_state(n)]
                check_names([f"{k}.{n}" for k, n in first], names, f"{self.directory} rank {rank}, stage {p}")


class MegatronSource(TensorSource):
    """The mcore tensors of an iteration of mp_rank files.

    Args:
        directory: the iter_XXXXXXX (or release) directory.
        shape: of the model, from our record or from an HF config.

    Raises:
        UserError: tensors are missing, unexpected, of a wrong shape; tied copies differ; recorded arguments contradict
            the shape.
    """

    def __init__(self, directory: str | Path, shape: ModelShape) -> None:
        super().__init__(shape, str(directory))
        self.files = RankFiles(Path(directory))
        self._check_args()
        self._check_tensors()

    def dtype(self, name: str) -> torch.dtype:
        return self.files.tensors(name)[0].dtype

    def read_part(self, name: str, part: int, start: int, stop: int) -> Tensor:
        pair, tensors = self.pairs[name], self.files.tensors(name)
        if pair.layout.tp_dim is None:
            for rank, other in enumerate(tensors[1:], start=1):
                if not torch.equal(tensors[0], other):
                    raise UserError(
                        f"checkpoint: {name} in {self.origin} differs between tensor-parallel ranks 0 and {rank}, "
                        f"although every rank holds a full copy; the run that wrote it diverged"
                    )
            return tensors[0][start:stop]
        return self._gather(pair, tensors, part, start, stop)

    def _gather(self, pair: TensorPair, tensors: list[Tensor], part: int, start: int, stop: int) -> Tensor:
        dim, tp = pair.layout.tp_dim, self.files.tp
        pieces, offset = [], 0
        for tensor in tensors:
            local = layouts.unpack(tensor, pair.layout.packing, self.shape, tp)[part]
            size = local.shape[dim]
            first, last = max(start - offset, 0), min(stop - offset, size)
            if first < last:
                pieces.append(local.narrow(dim, first, last - first))
            offset += size
        if not pieces:  # a rank that holds padding of the vocabulary alone
            return tensors[0][:0]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)

    def _check_args(self) -> None:
        recorded, ours = self.files.args(), megatron_args(self.shape)
        for name in ARGS_THAT_CHANGE_OUTPUTS:
            if recorded.get(name) is not None and recorded[name] != ours[name]:
                raise UserError(
                    f"checkpoint: {self.origin} was written with {name}={recorded[name]}, but the model's config says "
                    f"{ours[name]}; try: the config.json that belongs to it"
                )

    def _check_tensors(self) -> None:
        found = list(self.files.places)
        # The last stage has a copy of the embedding for a tied output layer or for multi-token prediction.
        why = {
            OUTPUT_LAYER: TIED if self.shape.tie_word_embeddings else None,
            EMBEDDING_AGAIN: "multi-token prediction shares them" if self.shape.mtp_num_layers else None,
        }
        for again in [name for name in why if why[name] and name in self.files.places]:
            found.remove(again)
            for embedding, copy in zip(self.files.tensors(EMBEDDING), self.files.tensors(again)):
                check_dims(again, embedding.shape, copy.shape, self.origin)
                check_equal(embedding, copy, f"the embeddings of the first and last stage in {self.origin}", why[again])
        check_names(list(self.pairs), found, self.origin)
        for name, pair in self.pairs.items():
            tensors = self.files.tensors(name)
            check_one_dtype(name, [tensor.dtype for tensor in tensors], self.origin)
            for tensor in tensors:
                padded = tensor.shape[0] * self.files.tp if pair.layout.packing == "vocab" else None
                check_dims(
                    name, layouts.local_shape(name, self.shape, self.files.tp, padded), tensor.shape, self.origin
                )
                if padded is not None:
                    layouts.vocab_range(self.shape.vocab_size, padded, 0, self.files.tp)


def _sizes(directory: Path) -> tuple[int, int]:
    """(tp, pp) from the names of the rank directories, all of which must be there."""
    ranks = set()
    for path in directory.glob("mp_rank_*"):
        match = _RANK.fullmatch(path.name)
        if match is None or match.group(3) is not None:
            raise UserError(f"checkpoint: {path} is not a dense model's rank; legal: mp_rank_<tp>[_<pp>]")
        ranks.add((int(match.group(1)), int(match.group(2) or 0)))
    if not ranks:
        raise UserError(f"checkpoint: no mp_rank_* directories in {directory}")
    tp, pp = (max(values) + 1 for values in zip(*ranks))
    missing = [rank_directory_name(t, p, pp) for p in range(pp) for t in range(tp) if (t, p) not in ranks]
    if missing:
        raise UserError(f"checkpoint: {directory} is incomplete: {', '.join(missing[:4])} is not there")
    return tp, pp
