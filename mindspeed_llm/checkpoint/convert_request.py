"""What a conversion is asked for, checked against the checkpoint that it starts from."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path

import torch

from mindspeed_llm.checkpoint.detect import Found, shape_of
from mindspeed_llm.checkpoint.megatron import MegatronSource
from mindspeed_llm.checkpoint.source import TensorSource
from mindspeed_llm.checkpoint.train_record import TRACKER_NAME
from mindspeed_llm.errors import UserError
from mindspeed_llm.models.hf_config import read_hf_config, shape_from_hf
from mindspeed_llm.models.shape import ModelShape

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_type(found: Found, load_type: str | None) -> None:
    """Refuse a checkpoint of another format than --load-model-type insists on.

    Raises:
        UserError: it is another, or the name is no format.
    """
    legal = {None: ("hf", "megatron", "torch_dist"), "hf": ("hf",), "mg": ("megatron", "torch_dist")}
    if load_type not in legal:
        raise UserError(f"convert: --load-model-type {load_type!r}; legal: hf, mg")
    if found.format not in legal[load_type]:
        raise UserError(
            f"convert: --load-model-type {load_type} but {found.path} is a {found.format} checkpoint; try: leave the "
            f"flag out"
        )


def check_no_layout(source: TensorSource, sizes: tuple[int, int], split: bool) -> None:
    """An HF directory has no layout; naming the one of the checkpoint read is a habit that does no harm.

    Args:
        sizes: (tensor-parallel, pipeline-parallel) that were asked for.
        split: whether anything else about a layout was asked for.

    Raises:
        UserError: a layout was asked for that is not the one of the checkpoint read.
    """
    legal = {(1, 1)}
    if isinstance(source, MegatronSource):
        legal.add((source.files.tp, source.files.pp))
    if split or sizes not in legal:
        raise UserError(
            f"convert: a parallel layout (tensor x pipeline = {sizes[0]} x {sizes[1]}) has no meaning for "
            f"--save-model-type hf; legal: {' or '.join(f'{t} x {p}' for t, p in sorted(legal))}; try: leave it out"
        )


def config_files_of(found: Found, save_dir: Path, save_type: str, hf_cfg_dir: str | Path | None) -> Path | None:
    """The directory that config.json and the tokenizer are taken from; None when there is none and none is needed.

    Raises:
        UserError: --hf-cfg-dir has no config.json, or a Hugging Face directory is to be written without any.
    """
    if hf_cfg_dir is not None:
        if not (Path(hf_cfg_dir) / "config.json").is_file():
            raise UserError(f"convert: --hf-cfg-dir {hf_cfg_dir} has no config.json; legal: a Hugging Face directory")
        return Path(hf_cfg_dir)
    if save_type == "hf" and (save_dir / "config.json").is_file():
        return save_dir
    if found.hf_files is None and save_type == "hf":
        raise UserError(
            f"convert: {found.path} carries no config.json and tokenizer; try: --hf-cfg-dir DIR that has them"
        )
    return found.hf_files


def agreed_shape(found: Found, config_files: Path | None, ignore_fields: Collection[str]) -> ModelShape:
    """The model's shape; what the checkpoint records and what config.json says must be the same.

    Raises:
        UserError: they differ; names the field.
    """
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


def check_megatron_target(save_dir: Path, found: Found) -> None:
    """Refuse to write mp_rank files over a checkpoint or into a model directory.

    Raises:
        UserError: `save_dir` is one.
    """
    if (save_dir / TRACKER_NAME).exists():
        raise UserError(f"convert: {save_dir} holds a Megatron checkpoint already; try: another --save-dir")
    if (save_dir / "config.json").exists() or save_dir.resolve() == found.path.resolve():
        raise UserError(
            f"convert: {save_dir} is a model directory, which is never written into; try: another --save-dir"
        )


def dtype_of(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The torch type that --params-dtype names; None keeps each tensor's.

    Raises:
        UserError: an unknown name.
    """
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise UserError(f"convert: --params-dtype {dtype!r}; legal: {', '.join(DTYPES)}")
    return DTYPES[dtype] if isinstance(dtype, str) else dtype
