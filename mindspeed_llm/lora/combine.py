"""Several sets of adapters as one: W + sum of w_i s_i B_i A_i is a single adapter of the ranks' sum, exactly.

A = [A_1; A_2; ...]      B = [w_1 s_1 B_1, w_2 s_2 B_2, ...]      scaling 1
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mindspeed_llm.checkpoint.detect import Found
from mindspeed_llm.errors import UserError
from mindspeed_llm.lora.io import fill_adapters
from mindspeed_llm.lora.peft_format import read_peft
from mindspeed_llm.lora.tensors import (
    AdapterTensors,
    PartAdapter,
    Place,
    adapted_places,
    read_adapters,
    read_trained_base,
)
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.plan.adaptable import adaptable_linears
from mindspeed_llm.plan.adapters import AdapterSettings


@dataclass(frozen=True)
class AdapterSet:
    """One set of adapters.

    Attributes:
        name: that users know it by.
    """

    name: str
    tensors: AdapterTensors
    settings: AdapterSettings

    def parts_of(self, module: str, parts: Sequence[str]) -> tuple[str, ...]:
        """Which parts of a kind of linear it adapts."""
        if module not in self.settings.targets:
            return ()
        return self.settings.targets[module] or tuple(parts)


def read_set(source: Found, settings: AdapterSettings, shape: ModelShape) -> AdapterSet:
    """The set in a checkpoint of ours or in a PEFT directory, called by the directory's name.

    Raises:
        UserError: it does not fit the model.
    """
    if source.format == "peft":
        return AdapterSet(source.path.name, *read_peft(source.directory, shape))
    if trained := read_trained_base(source.directory, shape):
        raise UserError(
            f"--lora-load: {source.path} holds {len(trained)} tensors of the base too ({next(iter(trained))}, ...), "
            "because --trainable trained them; legal: adapters alone, or that set alone; try: merge it first"
        )
    return AdapterSet(source.path.name, read_adapters(source.directory, shape, settings), settings)


def combined_settings(sets: Sequence[AdapterSet], shape: ModelShape) -> AdapterSettings:
    """Settings of the adapter that all sets are together, whatever their weights.

    Raises:
        UserError: a set has magnitudes, which do not add up.
    """
    for each in sets:
        if each.settings.use_dora:
            raise UserError(
                f"--lora-load: {each.name} has magnitudes (DoRA), so it is no summand; legal: sets without, or that "
                "one alone; try: convert_ckpt.py --lora-load to merge it into the base first"
            )
    targets, layers, ranks = {}, {}, {}
    for linear in adaptable_linears(shape):
        parts = tuple(p for p in linear.parts if any(p in each.parts_of(linear.module, linear.parts) for each in sets))
        if not parts:
            continue
        targets[linear.module] = parts if len(linear.parts) > 1 else ()
        for part in parts:
            ranks[f"{linear.module}/{part}"] = sum(
                rank for _, rank in _summands(sets, linear.module, part, linear.parts)
            )
        adapted = [layer for layer in linear.layers or () if any(s.settings.adapts(linear.module, layer) for s in sets)]
        if len(adapted) < len(linear.layers or ()):
            layers[linear.module] = tuple(adapted)
    alphas = {name: float(rank) for name, rank in ranks.items()}
    return AdapterSettings(max(ranks.values()), 1.0, 0.0, targets, layers, ranks, alphas)


def combined_tensors(
    sets: Sequence[AdapterSet], weights: Sequence[float], settings: AdapterSettings, shape: ModelShape
) -> AdapterTensors:
    """The adapters of `combined_settings`, in fp32."""
    return {
        (place.path, part): _joined(sets, weights, place, part)
        for place in adapted_places(shape, settings)
        for part in place.parts
    }


def _summands(sets: Sequence[AdapterSet], module: str, part: str, parts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """(number of the set, rank) of those that adapt a part."""
    for number, each in enumerate(sets):
        if part in each.parts_of(module, parts):
            yield number, each.settings.rank_of(module, part)


def _joined(sets: Sequence[AdapterSet], weights: Sequence[float], place: Place, part: str) -> PartAdapter:
    module, (width, out) = place.linear.module, place.linear.parts[part]
    rows: list[Tensor] = []
    columns: list[Tensor] = []
    for number, rank in _summands(sets, module, part, place.linear.parts):
        adapter = sets[number].tensors.get((place.path, part))
        if adapter is None:  # not in this layer
            adapter = PartAdapter(torch.zeros(rank, width), torch.zeros(out, rank))
        rows.append(adapter.a.float())
        columns.append(adapter.b.float() * (weights[number] * sets[number].settings.scaling_of(module, part)))
    return PartAdapter(torch.cat(rows), torch.cat(columns, dim=1))


class AdapterShelf:
    """Sets of adapters that a model has been given, of which any combination can be in use.

    Args:
        model: with adapters of `combined_settings` injected.
        sets: a name that stands twice gets a number.

    Attributes:
        weights: name -> weight of what is in use.
    """

    def __init__(self, model: nn.Module, sets: Sequence[AdapterSet], settings: AdapterSettings) -> None:
        self.model, self.sets, self.settings = model, sets, settings
        before = [[other.name for other in sets[:number]].count(each.name) for number, each in enumerate(sets)]
        self.names = [each.name if not count else f"{each.name}-{count + 1}" for each, count in zip(sets, before)]
        self.weights: dict[str, float] = {}

    def use(self, weights: dict[str, float]) -> None:
        """Combine the sets with these weights, those that are not named with 0.

        Raises:
            UserError: there is no set of that name.
        """
        if unknown := [name for name in weights if name not in self.names]:
            raise UserError(f"adapter: {unknown[0]!r} is not loaded; legal: {', '.join(self.names)}")
        factors = [float(weights.get(name, 0.0)) for name in self.names]
        fill_adapters(self.model, combined_tensors(self.sets, factors, self.settings, self.model.config.shape))
        self.weights = {name: factor for name, factor in zip(self.names, factors) if factor}
