"""The mp_rank files of one iteration, ours or foreign: which are there, what they hold, where each tensor lies.

They are mapped into memory and read without running their pickles.

<dir>/latest_checkpointed_iteration.txt
<dir>/iter_0000001/mp_rank_<tp>[_<pp>][_<ep>]/model_optim_rng.pt    {"model" or "model0".., "args", "iteration", ...}
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mindspeed_llm.checkpoint.expert_files import slice_of_stack
from mindspeed_llm.checkpoint.names import EMBEDDING, is_extra_state, plain_name
from mindspeed_llm.checkpoint.nf4_shards import matrix_in, weight_of
from mindspeed_llm.checkpoint.quantized import NF4_RECORD
from mindspeed_llm.checkpoint.source import check_names
from mindspeed_llm.errors import UserError
from mindspeed_llm.models import tensor_names
from mindspeed_llm.ops.nf4_matrix import Nf4Matrix

FILE_NAME = "model_optim_rng.pt"
# What a file says about its weights in NF4: how they are quantised, and "dtypes", which types they had.
NF4 = "nf4"
EMBEDDING_AGAIN = "last stage's " + EMBEDDING
_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")


class _Opaque:
    """Stands for an object of a class that only the writing program knows; nothing of that class is executed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


def rank_directory_name(tp_rank: int, pp_rank: int, pp: int, ep_rank: int = 0, ep: int = 1) -> str:
    """`mp_rank_01`, with the stage after it under pipeline and the experts' rank under expert parallelism."""
    stage, experts = f"_{pp_rank:03d}" if pp > 1 else "", f"_{ep_rank:03d}" if ep > 1 else ""
    return f"mp_rank_{tp_rank:02d}{stage}{experts}"


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
        raise UserError(
            f"checkpoint: {path} cannot be read ({error}); it may be incomplete; try: copy it again"
        ) from error


def rank_paths(directory: Path) -> dict[tuple[int, int, int], Path]:
    """(tensor rank, stage, expert rank) -> directory of the rank's file.

    A second number alone is the stage, unless the files were written without stages and with expert parallelism.

    Raises:
        UserError: directories are missing, or have other names.
    """
    numbers: dict[tuple[int, ...], Path] = {}
    for path in directory.glob("mp_rank_*"):
        match = _RANK.fullmatch(path.name)
        if match is None:
            raise UserError(f"checkpoint: {path} is not a rank; legal: mp_rank_<tp>[_<pp>][_<ep>]")
        numbers[tuple(int(number) for number in match.groups() if number is not None)] = path
    if not numbers:
        raise UserError(f"checkpoint: no mp_rank_* directories in {directory}; legal: mp_rank_<tp>[_<pp>][_<ep>]")
    lengths = {len(key) for key in numbers}
    if len(lengths) > 1:
        raise UserError(
            f"checkpoint: the names of mp_rank_* directories in {directory} are of different kinds; legal: one "
            "kind; try: remove those of another conversion"
        )
    kind = lengths.pop()
    experts_second = kind == 2 and max(numbers)[1:] != (0,) and _second_number_is_expert(numbers)
    paths = {}
    for key, path in numbers.items():
        tp_rank, second, third = (*key, 0, 0)[:3]
        paths[(tp_rank, 0, second) if experts_second else (tp_rank, second, third)] = path
    _check_complete(paths, directory)
    return paths


def _second_number_is_expert(numbers: Mapping[tuple[int, ...], Path]) -> bool:
    """Whether mp_rank_00_001 is an expert rank: its file then holds the whole depth of the model, as all others do."""
    held = []
    for _, path in (min(numbers.items()), max(numbers.items())):
        content = load_rank_file(path / FILE_NAME)
        names = content.get("model", content.get("model0", {}))
        held.append(EMBEDDING in names and any(plain_name(name).startswith("decoder.final") for name in names))
    return all(held)


def _check_complete(paths: Mapping[tuple[int, int, int], Path], directory: Path) -> None:
    tp, pp, ep = (max(values) + 1 for values in zip(*paths))
    pairs = {(t, e) for t, _, e in paths}
    missing = [(t, p, e) for p in range(pp) for t, e in sorted(pairs) if (t, p, e) not in paths]
    missing += [(t, 0, 0) for t in range(tp) if all(t != rank for rank, _ in pairs)]
    missing += [(0, 0, e) for e in range(ep) if all(e != rank for _, rank in pairs)]
    if missing:
        names = ", ".join(rank_directory_name(t, p, pp, e, ep) for t, p, e in missing[:4])
        raise UserError(f"checkpoint: {directory} is incomplete: {names} is not there; try: copy it again")


class Place(NamedTuple):
    """Where a tensor lies: in the files of which stage, under which key of a model chunk and name in the chunk.

    Attributes:
        expert: for an expert's tensor (expert-parallel rank, number on that rank); None for what all of them hold.
    """

    stage: int
    key: str
    stored: str
    expert: tuple[int, int] | None = None


class RankFiles:
    """The files of all tensor, pipeline and expert ranks of one iteration.

    Args:
        directory: the iter_XXXXXXX (or release) directory.
        num_experts: routed experts of the model, None for a dense one.

    Attributes:
        tp, pp, ep: sizes found.
        places: global mcore name -> Place. Layers are numbered in forward order (chunk by chunk, stage by stage), which
            needs no record of the split and skips no-op layers.

    Raises:
        UserError: rank directories are missing, or the layout is not a plain pipeline.
    """

    def __init__(self, directory: Path, num_experts: int | None = None) -> None:
        self.directory = directory
        self._paths = rank_paths(directory)
        self.tp, self.pp, self.ep = (max(values) + 1 for values in zip(*self._paths))
        if (num_experts or 1) % self.ep:
            raise UserError(
                f"checkpoint: {directory} has {self.ep} expert ranks, which {num_experts or 0} experts lack"
            )
        self._num_local_experts = (num_experts or 0) // self.ep
        self._content: dict[tuple[int, int, int], dict[str, Any]] = {}
        self._check_schedule()
        self.places = self._number_layers()
        self._check_ranks_agree()

    def content(self, tp_rank: int, pp_rank: int, ep_rank: int | None = None) -> dict[str, Any]:
        """One rank's dictionary; by default that of the first expert rank, which holds all dense layers."""
        if ep_rank is None:
            ep_rank = min(e for t, p, e in self._paths if (t, p) == (tp_rank, pp_rank))
        key = (tp_rank, pp_rank, ep_rank)
        if key not in self._content:
            self._content[key] = load_rank_file(self._paths[key] / FILE_NAME)
        return self._content[key]

    def tensors(self, name: str) -> list[Tensor | Nf4Matrix]:
        """All tensor-parallel ranks' tensors of one mcore name, in rank order; an expert's maybe once for each copy."""
        place = self.places[name]
        ep_rank, slot = place.expert or (None, None)
        contents = [self.content(t, place.stage, ep_rank)[place.key] for t in self.holders(name)]
        found = [matrix_in(content, place.stored) or content[place.stored] for content in contents]
        if not tensor_names.is_stacked_experts(place.stored):
            return found
        first = place.stored.endswith("weight1")
        return [self._slice(stack, first, slot) for stack in found]

    def holders(self, name: str) -> list[int]:
        """Tensor-parallel ranks whose files hold a tensor, in order."""
        place = self.places[name]
        ep_rank = None if place.expert is None else place.expert[0]
        return sorted({t for t, p, e in self._paths if p == place.stage and ep_rank in (None, e)})

    def _slice(self, stack: Tensor, first: bool, slot: int) -> Tensor:
        """[out, in] of one expert in weight1 [h, experts * out] (first) or weight2 [experts * in, h]."""
        rows, columns = stack.shape
        experts = self._num_local_experts
        dims = (columns // experts, rows) if first else (columns, rows // experts)
        return slice_of_stack(stack, dims, slot)

    def args(self) -> Mapping[str, Any]:
        """Arguments of the program that wrote the checkpoint; empty when there are none."""
        args = self.content(0, 0).get("args")
        return vars(args) if isinstance(args, argparse.Namespace) else {}

    def dtypes_in_nf4(self) -> dict[str, torch.dtype]:
        """Of the weights that are in NF4 the types that they had, by global mcore name.

        Raises:
            UserError: they were quantised in another way.
        """
        found: dict[str, torch.dtype] = {}
        for tp_rank, pp_rank, ep_rank in sorted(self._paths):
            record = self.content(tp_rank, pp_rank, ep_rank).get(NF4)
            if record is None:
                continue
            said = {field: record.get(field) for field in NF4_RECORD}
            if said != NF4_RECORD:
                raise UserError(
                    f"checkpoint: {self.directory} holds weights quantised as {said}, which is not implemented; legal: "
                    f"{NF4_RECORD}"
                )
            found |= record["dtypes"]
        return found

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
        held = [weight_of(name) for name in self.content(0, pp_rank)[key] if not is_extra_state(name)]
        stored_names = [name for name in held if name is not None]
        slots = sorted({i for name in stored_names if (i := tensor_names.layer_index(name)) is not None})
        for stored in stored_names:
            name, slot = plain_name(stored), tensor_names.layer_index(stored)
            if slot is not None:
                name = tensor_names.with_layer(name, next_layer + slots.index(slot))
            if name == EMBEDDING and name in places:
                name = EMBEDDING_AGAIN
            for whole, expert in self._holders(name):
                if whole in places:
                    stages = f"{places[whole].stage}, {pp_rank}"
                    raise UserError(f"checkpoint: {whole} is twice in {self.directory}, in stages {stages}")
                places[whole] = Place(pp_rank, key, stored, expert)
        return next_layer + len(slots)

    def _holders(self, name: str) -> list[tuple[str, tuple[int, int] | None]]:
        """(name in the whole model, Place.expert) of what files hold under a name; all expert ranks hold the same."""
        if self._num_local_experts == 0 or tensor_names.held_experts(name, self._num_local_experts, 0) is None:
            return [(name, None)]
        index = tensor_names.expert_index(name)
        found = []
        for ep_rank in range(self.ep):
            names = tensor_names.held_experts(name, self._num_local_experts, ep_rank)
            slots = range(self._num_local_experts) if index is None else (index,)
            found += [(whole, (ep_rank, slot)) for whole, slot in zip(names, slots)]
        return found

    def _check_ranks_agree(self) -> None:
        for p in range(self.pp):
            first = {(k, n) for k in self.model_keys(0, p) for n in self.content(0, p)[k] if not is_extra_state(n)}
            for rank, e in [(t, e) for t, stage, e in sorted(self._paths) if stage == p]:
                content = self.content(rank, p, e)
                keys = self.model_keys(rank, p)
                names = [f"{k}.{n}" for k in keys for n in content[k] if not is_extra_state(n)]
                check_names([f"{k}.{n}" for k, n in first], names, str(self._paths[rank, p, e]))
