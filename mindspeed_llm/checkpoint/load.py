"""Filling one rank's model from any checkpoint, reading only that rank's slices."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mindspeed_llm.checkpoint.names import EMBEDDING, OUTPUT_LAYER, is_extra_state, plain_name
from mindspeed_llm.checkpoint.nf4_shards import shard
from mindspeed_llm.checkpoint.source import TensorSource, check_dims, check_names
from mindspeed_llm.errors import UserError
from mindspeed_llm.models import layouts, tensor_names
from mindspeed_llm.models.nf4_weight import Nf4Weight, nf4_weights
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.ops.nf4_matrix import Nf4Matrix
from mindspeed_llm.parallel.layer_map import LayerMap, layer_map


@dataclass(frozen=True)
class Placement:
    """Which part of the model one rank (and one virtual stage) holds; needs no process group.

    Args:
        layers: the pipeline's layer map.
        tp_rank, tp: tensor-parallel rank and size.
        pp_rank, vpp_rank: pipeline stage, and model chunk within it.
        ep_rank, ep: expert-parallel rank and size.
        etp_rank, etp: rank and size of tensor parallelism within an expert.
    """

    layers: LayerMap
    tp_rank: int = 0
    tp: int = 1
    pp_rank: int = 0
    vpp_rank: int = 0
    ep_rank: int = 0
    ep: int = 1
    etp_rank: int = 0
    etp: int = 1

    def global_name(self, local: str) -> str:
        """The checkpoint's name of a built model's parameter: the layer's global index for its local one.

        Raises:
            UserError: this part has no such layer.
        """
        index = tensor_names.layer_index(local)
        if index is None:
            return local
        here = self.layers.built_layers(self.pp_rank, self.vpp_rank)
        if index >= len(here):
            raise UserError(
                f"checkpoint: {local} is not in the layer map of pipeline stage {self.pp_rank}, chunk {self.vpp_rank}, "
                f"which has {len(here)} layers"
            )
        return tensor_names.with_layer(local, here[index])

    def stored_name(self, local: str, shape: ModelShape) -> str:
        """As `global_name`, with an expert's number in the whole model, and one name for copies of tied embeddings."""
        name = self.global_name(local)
        if tensor_names.expert_index(name) is not None:
            return tensor_names.held_experts(name, shape.num_moe_experts // self.ep, self.ep_rank)[0]
        return EMBEDDING if name == OUTPUT_LAYER and shape.tie_word_embeddings else name

    def stored_names(self, local: str, shape: ModelShape) -> tuple[str, ...]:
        """The checkpoint's names of what a parameter holds: one, or those of all the experts that it stacks."""
        name = self.stored_name(local, shape)
        if not tensor_names.is_stacked_experts(name):
            return (name,)
        return tensor_names.held_experts(name, shape.num_moe_experts // self.ep, self.ep_rank)

    def cut(self, name: str) -> tuple[int, int]:
        """(rank, size) of the tensor parallelism that cuts a tensor: an expert's, or the dense layers'."""
        return (self.etp_rank, self.etp) if layouts.layout_of(name).expert else (self.tp_rank, self.tp)


@dataclass(frozen=True)
class LoadReport:
    """What a load did; `str()` is the line that is printed."""

    num_loaded: int
    num_expected: int
    num_parameters: int
    origin: str

    def __str__(self) -> str:
        return (
            f"loaded {self.num_loaded}/{self.num_expected} tensors, {self.num_parameters} parameters from {self.origin}"
        )


def load_into(
    model: torch.nn.Module | Mapping[str, Tensor],
    source: TensorSource,
    placement: Placement | None = None,
    *,
    quiet: bool = False,
) -> LoadReport:
    """Copy this rank's part of a checkpoint into a model, casting to the model's types on the way.

    Args:
        model: a built megatron model part, or its tensors by local name.
        source: `open_source(...)`; its shape is the whole model's.
        placement: which part this is; None for the whole model on one rank.
        quiet: do not print the report.

    Returns:
        The report; every tensor of the model was loaded.

    Raises:
        UserError: the model has a tensor that the checkpoint lacks, lacks one that belongs to this part, or a shape
            differs. Nothing has been copied then.
    """
    placement = placement or Placement(layer_map(source.shape.num_layers))
    targets = _targets(model)
    wanted = {local: placement.stored_names(plain_name(local), source.shape) for local in targets}
    expected = {name for name in source.names() if _belongs(name, placement, source.shape)}
    found = {name for names in wanted.values() for name in names}
    check_names(sorted(expected), sorted(found), f"the model for {source.origin}")
    for local, names in wanted.items():
        dims = _local_dims(names[0], targets[local], source, placement)
        stacked = (len(names),) if tensor_names.is_stacked_experts(local) else ()
        check_dims(local, (*stacked, *dims), targets[local].shape, "the model")
    with torch.no_grad():
        for local, names in wanted.items():
            if isinstance(targets[local], Nf4Weight):
                fill_nf4(targets[local], names, source, placement)
                continue
            slices = targets[local] if tensor_names.is_stacked_experts(local) else (targets[local],)
            for target, name in zip(slices, names):
                rank, size = placement.cut(name)
                padded = target.shape[0] * size if source.pairs[name].layout.packing == "vocab" else None
                target.copy_(source.read_shard(name, rank, size, padded))
    count = sum(target.numel() for target in targets.values())
    report = LoadReport(len(wanted), len(targets), count, source.origin)
    if not quiet:
        print(report, flush=True)
    return report


def load_hf_into(
    model: torch.nn.Module | Mapping[str, Tensor],
    hf_dir: str | Path,
    shape: ModelShape | None = None,
    placement: Placement | None = None,
    *,
    truncate_layers: int | None = None,
    quiet: bool = False,
) -> LoadReport:
    """`load_into` from a Hugging Face directory.

    Args:
        shape: what config.json describes, where the caller has it already.
        truncate_layers: take only the first N layers of the file, on purpose.

    Raises:
        UserError: as `load_into`, and whatever is wrong with the directory.
    """
    from mindspeed_llm.checkpoint.hf import HfSource

    source: TensorSource = HfSource(hf_dir, shape)
    if truncate_layers is not None:
        source = truncated(source, truncate_layers)
    return load_into(model, source, placement, quiet=quiet)


class _FirstLayers(TensorSource):
    """A source seen through a shape with fewer layers, or fewer multi-token prediction layers."""

    def __init__(self, inner: TensorSource, shape: ModelShape) -> None:
        left_out = inner.shape.mtp_num_layers - shape.mtp_num_layers
        what = f" without {left_out} prediction layers" if left_out else ""
        first = f"the first {shape.num_layers} layers of " if shape.num_layers < inner.shape.num_layers else ""
        super().__init__(shape, f"{first}{inner.origin}{what}")
        self._inner = inner

    @property
    def any_nf4(self) -> bool:
        return self._inner.any_nf4

    def dtype(self, name: str) -> torch.dtype:
        return self._inner.dtype(name)

    def read_part(self, name: str, part: int, start: int, stop: int) -> Tensor:
        return self._inner.read_part(name, part, start, stop)

    def read_nf4(self, name: str, part: int, start: int, stop: int, device: torch.device | None = None) -> Nf4Matrix:
        return self._inner.read_nf4(name, part, start, stop, device)


def truncated(source: TensorSource, num_layers: int) -> TensorSource:
    """The source without its later layers.

    Raises:
        UserError: it has no more than num_layers.
    """
    return part_of(source, truncated_shape(source.shape, num_layers))


def part_of(source: TensorSource, shape: ModelShape) -> TensorSource:
    """The source of a model that has fewer layers or multi-token prediction layers than the stored one."""
    return _FirstLayers(source, shape)


def fewer_predictions(shape: ModelShape, count: int, origin: str) -> ModelShape:
    """The shape with its first `count` multi-token prediction layers.

    Raises:
        UserError: the model has fewer.
    """
    if count > shape.mtp_num_layers:
        raise UserError(
            f"--mtp-num-layers: {count} contradicts {origin}, which has {shape.mtp_num_layers}; legal: 0 to "
            f"{shape.mtp_num_layers} (fewer leaves the others out), or leave the flag out"
        )
    return dataclasses.replace(shape, mtp_num_layers=count)


def truncated_shape(shape: ModelShape, num_layers: int) -> ModelShape:
    """The shape of the model's first num_layers layers.

    Raises:
        UserError: the model has fewer.
    """
    if not 1 <= num_layers <= shape.num_layers:
        raise UserError(f"model: --truncate-layers {num_layers} is wrong; legal: 1..{shape.num_layers}")
    if shape.moe_layers is not None:
        shape = dataclasses.replace(shape, moe_layers=tuple(n for n in shape.moe_layers if n < num_layers))
    windows = shape.window_layers
    if windows is not None:
        windows = tuple(layer for layer in windows if layer < num_layers)
    if windows == ():
        return dataclasses.replace(shape, num_layers=num_layers, window_size=None, window_layers=None)
    return dataclasses.replace(shape, num_layers=num_layers, window_layers=windows)


def fill_nf4(target: Nf4Weight, names: Sequence[str], source: TensorSource, placement: Placement) -> None:
    """Quantise this rank's slices of the tensors that a weight in NF4 stands for, one after the other."""
    for index, name in enumerate(names):

        def read(part: int, start: int, stop: int, name: str = name) -> Nf4Matrix:
            return source.read_nf4(name, part, start, stop, target.device)

        target.fill(shard(read, source.pairs[name], source.shape, *placement.cut(name)), index)


def _targets(model: torch.nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor | Nf4Weight]:
    tensors = model
    if isinstance(model, torch.nn.Module):
        tensors = model.state_dict(keep_vars=True) | nf4_weights(model)
    return {name: tensor for name, tensor in tensors.items() if not is_extra_state(name)}


def _belongs(name: str, placement: Placement, shape: ModelShape) -> bool:
    layers, p, v = placement.layers, placement.pp_rank, placement.vpp_rank
    expert = tensor_names.expert_index(name)
    if expert is not None and expert // (shape.num_moe_experts // placement.ep) != placement.ep_rank:
        return False
    layer = tensor_names.layer_index(name)
    if layer is not None:
        return layers.place(layer)[:2] == (p, v)
    if name == EMBEDDING:
        again = shape.tie_word_embeddings or shape.mtp_num_layers > 0
        return layers.is_first(p, v) or (again and layers.is_last(p, v))
    return layers.is_last(p, v)


def _local_dims(name: str, target: Tensor, source: TensorSource, placement: Placement) -> tuple[int, ...]:
    """Dimensions that a target must have; how far the vocabulary is padded is the target's own choice."""
    padded = None
    if source.pairs[name].layout.packing == "vocab":
        padded = target.shape[0] * placement.tp
        layouts.vocab_range(source.shape.vocab_size, padded, placement.tp_rank, placement.tp)
    return layouts.local_shape(name, source.shape, placement.cut(name)[1], padded)
