"""Conversion between Hugging Face, Megatron mp_rank and torch_dist checkpoints, one tensor at a time."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from mindspeed_llm.checkpoint.detect import Found, detect, open_source, shape_of
from mindspeed_llm.checkpoint.expert_files import ExpertLayout
from mindspeed_llm.checkpoint.hf import HfSource
from mindspeed_llm.checkpoint.hf_writer import SHARD_BYTES, HfWriter, PlannedTensor
from mindspeed_llm.checkpoint.load import fewer_predictions, part_of
from mindspeed_llm.checkpoint.megatron import MegatronSource
from mindspeed_llm.checkpoint.megatron_writer import MegatronLayout, MegatronWriter
from mindspeed_llm.checkpoint.source import TensorSource
from mindspeed_llm.checkpoint.train_record import (
    HF_FILES,
    TRACKER_NAME,
    iteration_directory,
    write_record,
    write_tracker,
)
from mindspeed_llm.checkpoint.train_save import copy_hf_files
from mindspeed_llm.errors import UserError
from mindspeed_llm.models.hf_config import prediction_field, read_hf_config, shape_from_hf
from mindspeed_llm.models.layouts import VOCAB_MULTIPLE, padded_vocab_size
from mindspeed_llm.models.mapping import to_hf
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.parallel.layer_map import layer_map

Transform = Callable[[str, Tensor], Tensor]
Dtypes = dict[str, torch.dtype]
Say = Callable[[str], None]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RESULT_INSIDE_ORIGINAL = "mg2hf"

# What one tensor needs at its worst: its parts, packed, and cast or cut. A 1.1B model in bf16 (largest tensor 125 MiB)
# was measured at 507 MiB of anonymous memory, 147 MiB of it Python and torch.
_COPIES = 3
_BASE_BYTES = 150 * 2**20


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
        quiet: print nothing.

    Returns:
        The directory written: the iteration's, or the HF model's.

    Raises:
        UserError: anything wrong with source, target, layout or disk space. Nothing incomplete stays behind that a
            loader would take for a checkpoint.
    """
    found = detect(load_dir)
    _check_type(found, load_type)
    if save_type not in ("hf", "mg"):
        raise UserError(f"convert: --save-model-type {save_type!r}; legal: hf, mg")
    config_files = _config_files(found, Path(save_dir), save_type, hf_cfg_dir)
    shape = _agreed_shape(found, config_files, ignore_fields)
    source = _open(found, shape, mtp_num_layers)
    shape = source.shape
    asked = _resolve_dtype(dtype)
    dtypes = {
        name: source.dtype(name) if asked is None or name.endswith(".expert_bias") else asked for name in source.names()
    }
    say = (lambda text: None) if quiet else (lambda text: print(text, flush=True))
    if save_type == "hf":
        split = bool(vpp or layer_list or noop_layers or embedding_as_layer or loss_as_layer)
        _check_no_layout(source, (tp, pp), split)
        return _convert_to_hf(
            source, dtypes, Path(save_dir), config_files, _resolve_dtype(dtype), transform, shard_bytes, say
        )
    padded = padded_vocab_size(shape.vocab_size, tp, vocab_multiple)
    layers = layer_map(shape.num_layers, pp, vpp, layer_list, noop_layers, embedding_as_layer, loss_as_layer)
    layout = MegatronLayout(layers, tp, padded, transformer_impl, experts or ExpertLayout())
    return _convert_to_megatron(source, dtypes, Path(save_dir), config_files, layout, found, transform, say)


def _convert_to_hf(
    source: TensorSource,
    dtypes: Dtypes,
    save_dir: Path,
    config_files: Path,
    dtype: torch.dtype | None,
    transform: Transform | None,
    shard_bytes: int,
    say: Say,
) -> Path:
    target = save_dir / RESULT_INSIDE_ORIGINAL if (save_dir / "config.json").is_file() else save_dir
    plan = [
        PlannedTensor(name, dims, dtypes[pair.mcore]) for pair in source.pairs.values() for name, dims in pair.stored()
    ]
    needed = sum(tensor.num_bytes for tensor in plan)
    _announce(source, dtypes, needed, target, transform is not None, say)
    writer = HfWriter(target, plan, shard_bytes)
    try:
        for name in _progress(source.names()):
            tensor = _transformed(source, name, transform)
            for hf_name, piece in to_hf(source.pairs[name], tensor, source.shape):
                writer.write(hf_name, piece)
        writer.finish(config_files, dtype, _config_changes(config_files, source.shape))
    except BaseException:
        writer.discard()
        raise
    HfSource(target, source.shape)
    say(_summary(source, dtypes))
    say(f"wrote {len(plan)}/{len(plan)} tensors to {target}")
    return target


def _convert_to_megatron(
    source: TensorSource,
    dtypes: Dtypes,
    save_dir: Path,
    config_files: Path | None,
    layout: MegatronLayout,
    found: Found,
    transform: Transform | None,
    say: Say,
) -> Path:
    _check_megatron_target(save_dir, found)
    iteration = found.iteration or 1
    final = iteration_directory(save_dir, iteration)
    aside = final.with_name(final.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    writer = MegatronWriter(aside, source.shape, layout, dtypes, iteration)
    _announce(source, dtypes, writer.num_bytes(), save_dir, transform is not None, say)
    steps = [(p, *entry) for p in range(layout.layers.pp) for entry in writer.stage_names(p)]
    try:
        current = -1
        for p, name, places in _progress(steps):
            if p != current:
                if current >= 0:
                    writer.close_stage(current)
                writer.open_stage(p)
                current = p
            writer.write(name, places, _transformed(source, name, transform))
        writer.close_stage(current)
        MegatronSource(aside, source.shape)
        if config_files is not None:
            copy_hf_files(config_files, aside / HF_FILES)
        write_record(aside, _record(source, layout, dtypes, iteration))
    except BaseException:
        writer.discard()
        raise
    os.replace(aside, final)
    write_tracker(save_dir, iteration)
    say(_summary(source, dtypes))
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


def _config_changes(config_files: Path, shape: ModelShape) -> dict[str, int]:
    """What config.json must say otherwise for the tensors that are written."""
    stated = prediction_field(read_hf_config(config_files))
    return {stated[0]: shape.mtp_num_layers} if stated and stated[1] != shape.mtp_num_layers else {}


def _transformed(source: TensorSource, name: str, transform: Transform | None) -> Tensor:
    tensor = source.read(name)
    if transform is None:
        return tensor
    result = transform(name, tensor)
    assert result.shape == tensor.shape, f"the transform changed the shape of {name}"
    return result


def _check_type(found: Found, load_type: str | None) -> None:
    legal = {None: ("hf", "megatron", "torch_dist"), "hf": ("hf",), "mg": ("megatron", "torch_dist")}
    if load_type not in legal:
        raise UserError(f"convert: --load-model-type {load_type!r}; legal: hf, mg")
    if found.format not in legal[load_type]:
        raise UserError(
            f"convert: --load-model-type {load_type} but {found.path} is a {found.format} checkpoint; try: leave the "
            f"flag out"
        )


def _check_no_layout(source: TensorSource, sizes: tuple[int, int], split: bool) -> None:
    """An HF directory has no layout; naming the one of the checkpoint read is a habit that does no harm."""
    legal = {(1, 1)}
    if isinstance(source, MegatronSource):
        legal.add((source.files.tp, source.files.pp))
    if split or sizes not in legal:
        raise UserError(
            f"convert: a parallel layout (tensor x pipeline = {sizes[0]} x {sizes[1]}) has no meaning for "
            f"--save-model-type hf; legal: {' or '.join(f'{t} x {p}' for t, p in sorted(legal))}; try: leave it out"
        )


def _config_files(found: Found, save_dir: Path, save_type: str, hf_cfg_dir: str | Path | None) -> Path | None:
    """The directory that config.json and the tokenizer are taken from."""
    if hf_cfg_dir is not None:
        if not (Path(hf_cfg_dir) / "config.json").is_file():
            raise UserError(f"convert: --hf-cfg-dir {hf_cfg_dir} has no config.json; legal: a Hugging Face directory")
        return Path(hf_cfg_dir)
    if save_type == "hf" and (save_dir / "config.json").is_file():
        return save_dir
    if found.hf_files is None and save_type == "hf":
        raise UserError(
            f"convert: {found.path} carries no config.json and tokenizer; try: --hf-cfg-dir DIR of the original model"
        )
    return found.hf_files


def _agreed_shape(found: Found, config_files: Path | None, ignore_fields: Collection[str]) -> ModelShape:
    """The model's shape; what the checkpoint records and what config.json says must be the same."""
    if config_files is None:
        return shape_of(found, ignore_fields)
    described = shape_from_hf(read_hf_config(config_files), ignore_fields)
    if found.format == "hf" or found.record.get("shape"):
        recorded = shape_of(found, ignore_fields)
        if recorded.mtp_num_layers < described.mtp_num_layers:
            described = dataclasses.replace(described, mtp_num_layers=recorded.mtp_num_layers)
        for item in dataclasses.fields(ModelShape):
            ours, theirs = getattr(recorded, item.name), getattr(described, item.name)
            if ours != theirs and item.name not in ("init_method_std", "attention_dropout"):
                raise UserError(
                    f"convert: {found.path} has {item.name}={ours}, but {config_files / 'config.json'} says {theirs}; "
                    f"try: the config.json that belongs to the checkpoint"
                )
    return described


def _check_megatron_target(save_dir: Path, found: Found) -> None:
    if (save_dir / TRACKER_NAME).exists():
        raise UserError(f"convert: {save_dir} holds a Megatron checkpoint already; try: another --save-dir")
    if (save_dir / "config.json").exists() or save_dir.resolve() == found.path.resolve():
        raise UserError(
            f"convert: {save_dir} is a model directory, which is never written into; try: another --save-dir"
        )


def _resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise UserError(f"convert: --params-dtype {dtype!r}; legal: {', '.join(DTYPES)}")
    return DTYPES[dtype] if isinstance(dtype, str) else dtype


def _announce(source: TensorSource, dtypes: Dtypes, disk: int, target: Path, merges: bool, say: Say) -> None:
    """Print what the conversion will take, and refuse to start when the disk cannot hold it."""
    widest = {n: max(source.dtype(n).itemsize, dtypes[n].itemsize, 4 if merges else 0) for n in source.names()}
    largest = max(torch.Size(source.dims(n)).numel() * widest[n] for n in source.names())
    memory = _BASE_BYTES + _COPIES * largest
    say(f"converting {source.origin}: peak memory about {_gib(memory)}, disk {_gib(disk)}")
    existing = next(parent for parent in (target, *target.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if disk > free:
        raise UserError(f"convert: {target} needs {_gib(disk)} but {_gib(free)} are free; try: another --save-dir")


def _summary(source: TensorSource, dtypes: Dtypes) -> str:
    count = len(source.names())
    kinds = ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes.values()}))
    return f"loaded {count}/{count} tensors, {source.shape.num_parameters()} parameters from {source.origin} ({kinds})"


def _progress(items: Sequence) -> Iterator:
    console = Console(file=sys.stderr)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        yield from bar.track(items, description="tensors")


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
