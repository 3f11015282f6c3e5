"""The base model of adapters: recorded when they are saved, compared when they are used."""

from __future__ import annotations

from typing import Any

from mindspeed_llm.checkpoint.detect import Found, open_source
from mindspeed_llm.checkpoint.fingerprint import fingerprint, first_difference
from mindspeed_llm.errors import UserError
from mindspeed_llm.models.shape import ModelShape


def base_record(weights: Found | None, stored_shape: ModelShape, adapted: bool) -> dict[str, Any] | None:
    """What a checkpoint records about the weights that its run started from; None for random ones.

    Args:
        stored_shape: architecture of what `weights` holds.
        adapted: the checkpoint will hold adapters alone, which are worth nothing on other weights.
    """
    if weights is None:
        return None
    record = {"path": str(weights.path.resolve()), "kind": weights.format}
    return record | {"fingerprint": fingerprint(open_source(weights, stored_shape))} if adapted else record


def check_base(adapter: Found, weights: Found, stored_shape: ModelShape) -> None:
    """Refuse adapters on weights that they were not trained on; PEFT's do not record theirs and pass.

    Raises:
        UserError: the weights differ, or the adapters were trained on random ones.
    """
    if adapter.format != "adapter":
        return
    base = adapter.record["base"]
    if base is None:
        raise UserError(
            f"lora: {adapter.path} was trained on random weights that were never saved, so {weights.path} is not its "
            "base; legal: resuming that run without --load; try: adapters trained on a saved model"
        )
    difference = first_difference(base["fingerprint"], open_source(weights, stored_shape))
    if difference is not None:
        raise UserError(
            f"lora: {weights.path} is not the base that {adapter.path} was trained on, because it has {difference}; "
            f"legal: that base in any format and layout; try: {base['path']}"
        )
