"""Conversion between Hugging Face, Megatron mp_rank and torch_dist checkpoints, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mindspeed_llm.checkpoint import directory
from mindspeed_llm.checkpoint.convert_report import Dtypes, Say, announce, progress, summary
from mindspeed_llm.checkpoint.convert_request import (
    agreed_shape,
    check_megatron_target,
    check_no_layout,
    check_type,
    config_files_of,
    dtype_of,
)
from mindspeed_llm.checkpoint.detect import Found, detect, open_source
from mindspeed_llm.checkpoint.expert_files import ExpertLayout
from mindspeed_llm.checkpoint.hf import HfSource
from mindspeed_llm.checkpoint.hf_nf4 import quantization_config, stored_dims, stored_tensors
from mindspeed_llm.checkpoint.hf_writer import SHARD_BYTES, HfWriter, PlannedTensor
from mindspeed_llm.checkpoint.load import fewer_predictions, part_of
from mindspeed_llm.checkpoint.megatron import MegatronSource
from mindspeed_llm.checkpoint.megatron_writer import MegatronLayout, MegatronWriter
from mindspeed_llm.checkpoint.names import EMBEDDING
from mindspeed_llm.checkpoint.quantized import NF4_RECORD, DequantizedSource
from mindspeed_llm.checkpoint.source import TensorSource
from mindspeed_llm.checkpoint.train_record import HF_FILES, write_record
from mindspeed_llm.checkpoint.train_save import copy_hf_files
from mindspeed_llm.errors import UserError
from mindspeed_llm.models.hf_config import prediction_field, read_hf_config
from mindspeed_llm.models.layouts import VOCAB_MULTIPLE, padded_vocab_size
from mindspeed_llm.models.mapping import TensorPair, to_hf
from mindspeed_llm.models.nf4_weight import is_quantized
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.ops.nf4_matrix import quantize_matrix
from mindspeed_llm.parallel.layer_map import layer_map

Transform = Callable[[str, Tensor], Tensor]
RESULT_INSIDE_ORIGINAL = "mg2hf"


def convert(
    load_dir: str | Path,
    save_dir: str | Path,
    load_type: str | None = None,
    save_type: str = "mg",
    tp: int = 1,
    pp: int = 1,
    vpp: int | None = None,
    layer_list: Sequence[int] | None = None,
    noop_layers: Iterable[int] | None = None,
    embedding_as_layer: bool = False,
    loss_as_layer: bool = False,
    *,
    experts: ExpertLayout | None = None,
    dtype: str | torch.dtype | None = None,
    hf_cfg_dir: str | Path | None = None,
    transform: Transform | None = None,
    transformer_impl: str = "local",
    vocab_multiple: int = VOCAB_MULTIPLE,
    shard_bytes: int = SHARD_BYTES,
    ignore_fields: Collection[str] = (),
    mtp_num_layers: int | None = None,
    dequantized: bool = False,
    quantize: bool = False,
    notes: Mapping[str, str] | None = None,
    replace: bool = False,
    quiet: bool = False,
) -> Path:
    """Convert a checkpoint; every tensor is read, transformed and written before the next one.

    Args:
        load_dir: HF directory, Megatron checkpoint directory or one of its iterations.
        save_dir: for "mg" a directory without a checkpoint; for "hf" a directory without weights, or the original HF
            directory, in which case the result goes to `save_dir/mg2hf`.
        load_type: "hf" or "mg" to insist on a format ("mg" stands for mp_rank files and torch_dist); None detects it.
        save_type: "mg" (mp_rank files) or "hf".
        tp, pp, vpp, layer_list, noop_layers, embedding_as_layer, loss_as_layer: layout to write, see
            `parallel.layer_map`; vpp counts model chunks per stage. For "hf" they must be left alone (tp and pp may
            repeat the sizes of the Megatron checkpoint read).
        experts: how routed experts are cut and stored, for "mg" only; None is one by one, on one expert rank.
        dtype: type of the written weights ("fp32", "bf16", "fp16" or a torch type); None keeps each tensor's. The
            router's score biases keep theirs: rounding them changes which experts are chosen.
        hf_cfg_dir: where config.json and the tokenizer come from; needed only when neither the checkpoint nor save_dir
            has them.
        transform: (mcore name, unsharded tensor) -> tensor of the same shape, applied to each one (merging adapters).
        transformer_impl: "local", or "transformer_engine" for its spelling of norm weights.
        vocab_multiple: the vocabulary is padded to a multiple of this times tp.
        shard_bytes: size of the safetensors files.
        ignore_fields: fields of config.json to disregard.
        mtp_num_layers: leave out the multi-token prediction layers behind the first so many; None keeps all.
        dequantized: read the linears of the layers as NF4 rounds them, as a QLoRA run does.
        quantize: write the linears of the layers in NF4: for "hf" as bitsandbytes does, for "mg" with each rank's part.
        notes: recorded beside the written tensors.
        replace: for "hf", put the result in place of the model that `save_dir` holds, once it is complete.
        quiet: print nothing.

    Returns:
        The directory written: the iteration's, or the HF model's.

    Raises:
        UserError: anything wrong with source, target, layout or disk space. Nothing incomplete stays behind that a
            loader would take for a checkpoint.
    """
    found = detect(load_dir)
    check_type(found, load_type)
    if save_type not in ("hf", "mg"):
        raise UserError(f"convert: --save-model-type {save_type!r}; legal: hf, mg")
    config_files = config_files_of(found, Path(save_dir), save_type, hf_cfg_dir)
    shape = agreed_shape(found, config_files, ignore_fields)
    source = _open(found, shape, mtp_num_layers)
    if dequantized:
        source = DequantizedSource(source)
    shape = source.shape
    asked = dtype_of(dtype)
    dtypes = {
        name: source.dtype(name) if asked is None or name.endswith(".expert_bias") else asked for name in source.names()
    }
    if quantize and source.any_nf4:
        raise UserError(f"convert: --qlora-nf4: {source.origin} is in NF4 already; legal: unquantised weights")
    say = (lambda text: None) if quiet else (lambda text: print(text, flush=True))
    if save_type == "hf":
        split = bool(vpp or layer_list or noop_layers or embedding_as_layer or loss_as_layer)
        check_no_layout(source, (tp, pp), split)
        target = _HfTarget(Path(save_dir), config_files, dtype_of(dtype), shard_bytes, replace, quantize, notes)
        return _convert_to_hf(source, dtypes, target, transform, say)
    padded = padded_vocab_size(shape.vocab_size, tp, vocab_multiple)
    layers = layer_map(shape.num_layers, pp, vpp, layer_list, noop_layers, embedding_as_layer, loss_as_layer)
    layout = MegatronLayout(layers, tp, padded, transformer_impl, experts or ExpertLayout())
    target = _MegatronTarget(Path(save_dir), config_files, layout, quantize, notes)
    return _convert_to_megatron(source, dtypes, target, found, transform, say)


@dataclass(frozen=True)
class _HfTarget:
    """A Hugging Face directory to write; see `convert`."""

    save_dir: Path
    config_files: Path
    dtype: torch.dtype | None
    shard_bytes: int
    replace: bool
    quantize: bool
    notes: Mapping[str, str] | None

    @property
    def directory(self) -> Path:
        """Where the files go."""
        beside = (self.save_dir / "config.json").is_file() and not self.replace
        return self.save_dir / RESULT_INSIDE_ORIGINAL if beside else self.save_dir

    def planned(self, pair: TensorPair, dtype: torch.dtype) -> Iterator[PlannedTensor]:
        """What a tensor is written as."""
        for name, dims in pair.stored():
            if self.quantize and is_quantized(pair.mcore):
                for stored, (size, stored_dtype) in stored_dims(name, dims).items():
                    yield PlannedTensor(stored, size, stored_dtype)
            else:
                yield PlannedTensor(name, dims, dtype)

    def pieces(self, pair: TensorPair, tensor: Tensor, shape: ModelShape, dtype: torch.dtype) -> Iterator:
        """(name, tensor) in the same order."""
        for name, piece in to_hf(pair, tensor, shape):
            if self.quantize and is_quantized(pair.mcore):
                yield from stored_tensors(name, quantize_matrix(piece.to(dtype)), dtype)
            else:
                yield name, piece

    def config_changes(self, source: TensorSource, dtypes: Dtypes) -> dict[str, Any]:
        """What config.json must say otherwise for the tensors that are written."""
        stated = prediction_field(read_hf_config(self.config_files))
        shape, changes = source.shape, {}
        if stated and stated[1] != shape.mtp_num_layers:
            changes[stated[0]] = shape.mtp_num_layers
        if not self.quantize:
            return changes | {"quantization_config": None}
        skipped = {
            hf.removesuffix(".weight").rsplit(".", 1)[-1]
            for name, pair in source.pairs.items()
            for hf, dims in zip(pair.hf, pair.hf_dims)
            if len(dims) == 2 and not is_quantized(name) and name != EMBEDDING
        }
        return changes | {"quantization_config": quantization_config({"lm_head", *skipped}, dtypes[EMBEDDING])}


def _convert_to_hf(source: TensorSource, dtypes: Dtypes, to: _HfTarget, transform: Transform | None, say: Say) -> Path:
    target = to.directory
    plan = [piece for name, pair in source.pairs.items() for piece in to.planned(pair, dtypes[name])]
    needed = sum(tensor.num_bytes for tensor in plan)
    announce(source, dtypes, needed, target, transform is not None, say)
    writer = HfWriter(target, plan, to.shard_bytes, to.replace, to.notes)
    try:
        for name in progress(source.names()):
            tensor = _transformed(source, name, transform)
            for hf_name, piece in to.pieces(source.pairs[name], tensor, source.shape, dtypes[name]):
                writer.write(hf_name, piece)
        writer.finish(to.config_files, to.dtype, to.config_changes(source, dtypes))
    except BaseException:
        writer.discard()
        raise
    HfSource(target, source.shape)
    say(summary(source, dtypes))
    say(f"wrote {len(plan)}/{len(plan)} tensors to {target}")
    return target


@dataclass(frozen=True)
class _MegatronTarget:
    """A directory of mp_rank files to write; see `convert`."""

    save_dir: Path
    config_files: Path | None
    layout: MegatronLayout
    quantize: bool
    notes: Mapping[str, str] | None


def _convert_to_megatron(
    source: TensorSource, dtypes: Dtypes, to: _MegatronTarget, found: Found, transform: Transform | None, say: Say
) -> Path:
    check_megatron_target(to.save_dir, found)
    layout, iteration = to.layout, found.iteration or 1
    aside = directory.aside_of(to.save_dir, iteration)
    writer = MegatronWriter(aside, source.shape, layout, dtypes, iteration, to.quantize)
    announce(source, dtypes, writer.num_bytes(), to.save_dir, transform is not None, say)
    steps = [(p, *entry) for p in range(layout.layers.pp) for entry in writer.stage_names(p)]
    directory.begin(to.save_dir, iteration)
    with directory.discarding(aside):
        current = -1
        for p, name, places in progress(steps):
            if p != current:
                if current >= 0:
                    writer.close_stage(current)
                writer.open_stage(p)
                current = p
            writer.write(name, places, _transformed(source, name, transform))
        writer.close_stage(current)
        MegatronSource(aside, source.shape)
        if to.config_files is not None:
            copy_hf_files(to.config_files, aside / HF_FILES)
        quantized = {"quantized": NF4_RECORD} if to.quantize else {}
        write_record(aside, _record(source, layout, dtypes, iteration) | quantized | dict(to.notes or {}))
        final = directory.complete(aside, iteration)
    say(summary(source, dtypes))
    kinds, sizes = "tensor-parallel x pipeline", f"{layout.tp} x {layout.layers.pp}"
    if layout.experts.ep > 1:
        kinds, sizes = kinds + " x expert-parallel", f"{sizes} x {layout.experts.ep}"
    say(f"wrote {kinds} = {sizes} ranks to {final}")
    return final


def _record(source: TensorSource, layout: MegatronLayout, dtypes: Dtypes, iteration: int) -> dict:
    from mindspeed_llm import __version__

    return {
        "format": "megatron",
        "version": __version__,
        "iteration": iteration,
        "shape": source.shape.to_json(),
        "layout": layout.to_json(),
        "dtypes": sorted({str(dtype).removeprefix("torch.") for dtype in dtypes.values()}),
        "converted_from": source.origin,
    }


def _open(found: Found, shape: ModelShape, mtp_num_layers: int | None) -> TensorSource:
    """The checkpoint, without the multi-token prediction layers that are not wanted."""
    if mtp_num_layers is None or mtp_num_layers == shape.mtp_num_layers:
        return open_source(found, shape)
    fewer = fewer_predictions(shape, mtp_num_layers, str(found.path))
    # a Hugging Face directory may lack the layers that its config.json counts
    return open_source(found, fewer) if found.format == "hf" else part_of(open_source(found, shape), fewer)


def _transformed(source: TensorSource, name: str, transform: Transform | None) -> Tensor:
    tensor = source.read(name)
    if transform is None:
        return tensor
    result = transform(name, tensor)
    assert result.shape == tensor.shape, f"the transform changed the shape of {name}"
    return result
