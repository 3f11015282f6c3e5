"""The base model of adapters: recorded when they are saved, compared when they are used."""

from __future__ import annotations

import json
from typing import Any

from mindspeed_llm.checkpoint.detect import Found, open_source
from mindspeed_llm.checkpoint.fingerprint import fingerprint, first_difference
from mindspeed_llm.checkpoint.quantized import NF4_RECORD, DequantizedSource
from mindspeed_llm.checkpoint.source import TensorSource
from mindspeed_llm.errors import UserError
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.plan.peft_settings import BASE, WEIGHTS


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

    Raises:
        UserError: the weights differ, or the adapters were trained on random ones.
    """
    base = base_in(adapter)
    if base is None and adapter.format == "peft":
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
