"""Which parameters are trained: by regular expression or by layer."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from mindspeed_llm.errors import UserError

LAYER_IN_NAME = re.compile(r"^decoder\.layers\.(\d+)\.")


def parse_layers(text: str, num_layers: int, flag: str) -> set[int]:
    """Layer indices from `first:N`, `last:N` or a comma list with ranges like `0-3,7`.

    Raises:
        UserError: another form, or an index that the model does not have.
    """
    wrong = UserError(
        f"{flag}: {text!r} is wrong; legal: first:N, last:N or indices like 0-3,7 below {num_layers} layers"
    )
    kind, colon, count = text.partition(":")
    if colon:
        if kind not in ("first", "last") or not count.isdigit() or not 0 < int(count) <= num_layers:
            raise wrong
        layers = range(num_layers)
        return set(layers[: int(count)] if kind == "first" else layers[num_layers - int(count) :])
    chosen: set[int] = set()
    for item in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", item.strip())
        if match is None:
            raise wrong
        low, high = int(match[1]), int(match[2] or match[1])
        if low > high or high >= num_layers:
            raise wrong
        chosen.update(range(low, high + 1))
    return chosen


def freeze_parameters(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    num_layers: int,
    trainable: list[str] | None = None,
    freeze: list[str] | None = None,
    trainable_layers: str | None = None,
    frozen_layers: str | None = None,
) -> tuple[set[str], set[str]]:
    """Set `requires_grad` of every parameter; a parameter is trained when no given selection excludes it.

    `trainable` and `trainable_layers` name what is trained (everything else is not), `freeze` and `frozen_layers` what
    is not. Parameters outside the layers (embedding, final norm, head) are not selected by `trainable_layers`.

    Args:
        named_parameters: by their names in the whole model.

    Returns:
        (names trained here, patterns that matched something here); patterns must be checked over all stages.
    """
    only = parse_layers(trainable_layers, num_layers, "--trainable-layers") if trainable_layers else None
    never = parse_layers(frozen_layers, num_layers, "--frozen-layers") if frozen_layers else set()
    trained: set[str] = set()
    matched: set[str] = set()
    for name, parameter in named_parameters:
        layer = layer_of(name)
        yes = [p for p in trainable or () if re.search(p, name)]
        no = [p for p in freeze or () if re.search(p, name)]
        matched.update(yes, no)
        wanted = (not trainable or bool(yes)) and not no
        wanted &= (only is None or layer in only) and layer not in never
        parameter.requires_grad_(wanted)
        if wanted:
            trained.add(name)
    return trained, matched


def layer_of(name: str) -> int | None:
    """Layer index in a parameter name, None outside the layers."""
    match = LAYER_IN_NAME.search(name)
    return int(match[1]) if match else None
