"""The base model of adapters: recorded when they are saved, compared when they are used."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from mindspeed_llm.checkpoint.detect import Found, open_source
from mindspeed_llm.checkpoint.fingerprint import fingerprint, first_difference
from mindspeed_llm.checkpoint.names import EMBEDDING, OUTPUT_LAYER
from mindspeed_llm.checkpoint.quantized import NF4_RECORD, DequantizedSource
from mindspeed_llm.checkpoint.source import TensorSource
from mindspeed_llm.errors import UserError
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.plan.peft_settings import BASE, WEIGHTS, adapter_file


def base_record(
    weights: Found | None, stored_shape: ModelShape, adapted: bool, quantized: bool = False
) -> dict[str, Any] | None:
    """What a checkpoint records about the weights that its run started from; None for random ones.

    Args:
        quantized: they are held in NF4; the fingerprint is of what that stands for.
        stored_shape: architecture of what `weights` holds.
        adapted: the checkpoint will hold adapters alone, which are worth nothing on other weights.
    """
    if weights is None:
        return None
    record = {"path": str(weights.path.resolve()), "kind": weights.format}
    if not adapted:
        return record
    if quantized:
        record["quantized"] = NF4_RECORD
    return record | {"fingerprint": fingerprint(_base(weights, stored_shape, quantized))}


def _base(weights: Found, stored_shape: ModelShape, quantized: bool) -> TensorSource:
    source = open_source(weights, stored_shape)
    return DequantizedSource(source) if quantized else source


def base_in(adapter: Found) -> dict[str, Any] | None:
    """What an adapter checkpoint records about its base; PEFT's have it where we wrote them.

    Raises:
        UserError: the file of the adapters is damaged.
    """
    if adapter.format != "peft":
        return adapter.record["base"]
    path = adapter.directory / WEIGHTS
    if not path.is_file():
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(BASE)
    except SafetensorError as wrong:
        raise UserError(f"lora: {path} is damaged ({wrong}); try: copy it again") from None
    return None if text is None else json.loads(text)


def check_base(adapter: Found, weights: Found, stored_shape: ModelShape) -> None:
    """Refuse adapters on weights that they were not trained on; those that do not record theirs (PEFT's) pass.

    Beside adapters of an embedding PEFT saves the embedding itself, which tells.

    Raises:
        UserError: the weights differ, or the adapters were trained on random ones.
    """
    base = base_in(adapter)
    if base is None and adapter.format == "peft":
        _check_saved_embeddings(adapter, weights, stored_shape)
        return
    if base is None:
        raise UserError(
            f"lora: {adapter.path} was trained on random weights that were never saved, so {weights.path} is not its "
            "base; legal: resuming that run without --load; try: adapters trained on a saved model"
        )
    quantized = base.get("quantized")
    if quantized not in (None, NF4_RECORD):
        raise UserError(
            f"lora: the base of {adapter.path} was quantised as {quantized}, which is not implemented; legal: "
            f"{NF4_RECORD}"
        )
    difference = first_difference(base["fingerprint"], _base(weights, stored_shape, quantized is not None))
    if difference is not None:
        raise UserError(
            f"lora: {weights.path} is not the base that {adapter.path} was trained on, because it has {difference}; "
            f"legal: that base in any format and layout; try: {base['path']}"
        )


def _check_saved_embeddings(adapter: Found, weights: Found, stored_shape: ModelShape) -> None:
    source = open_source(weights, stored_shape)
    with adapter_file(adapter.directory) as (names, read):
        for name in (EMBEDDING, OUTPUT_LAYER):
            ends = tuple(f"{hf.removesuffix('.weight')}.base_layer.weight" for hf in _hf_names(source, name))
            for key in [key for key in names if ends and key.endswith(ends)]:
                if not _same_but_for_rounding(read(key), source.read(name)):
                    raise UserError(
                        f"lora: {weights.path} is not the base of {adapter.path}, because {key} there is another "
                        "matrix; legal: that base; try: merge the adapters with the program that made them"
                    )


def _hf_names(source: TensorSource, name: str) -> tuple[str, ...]:
    return source.pairs[name].hf if name in source.pairs else ()


def _same_but_for_rounding(saved: Tensor, base: Tensor) -> bool:
    """Whether two matrices are one, each in its type."""
    if saved.shape != base.shape:
        return False
    return torch.equal(saved.to(base.dtype), base) or torch.equal(saved, base.to(saved.dtype))
