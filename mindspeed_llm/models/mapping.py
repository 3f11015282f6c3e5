"""A family's tensor rules applied to one shape: every mcore tensor of the model with the HF tensors it is made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from mindspeed_llm.models import layouts, packing
from mindspeed_llm.models.family import TensorRule, get_family
from mindspeed_llm.models.layouts import TensorLayout
from mindspeed_llm.models.shape import ModelShape

Array = TypeVar("Array")


@dataclass(frozen=True)
class TensorPair:
    """One mcore tensor and its HF tensors, with the layer number filled in.

    Args:
        mcore: name with the global layer index.
        hf: HF names.
        transform: "copy", "parts" or "concatenated" (see TensorRule).
        layout: tensor-parallel layout of the mcore tensor.
        dims: shape of the unsharded, unpadded mcore tensor.
        hf_dims: shape of each HF tensor.
        hf_copies: names under which HF stores the (one) tensor again.
    """

    mcore: str
    hf: tuple[str, ...]
    transform: str
    layout: TensorLayout
    dims: tuple[int, ...]
    hf_dims: tuple[tuple[int, ...], ...]
    hf_copies: tuple[str, ...] = ()

    def stored(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape) of every HF tensor that `to_hf` gives, in its order."""
        yield from zip(self.hf, self.hf_dims)
        for name in self.hf_copies:
            yield name, self.hf_dims[0]


def tensor_pairs(shape: ModelShape) -> list[TensorPair]:
    """All tensors of a model: embedding, layers in order, final norm, output layer, multi-token prediction layers."""
    rules = [rule for rule in get_family(shape.family).tensors if exists(rule, shape)]
    first_layer_rule = next(i for i, rule in enumerate(rules) if "{i}" in rule.mcore)
    per_layer = [rule for rule in rules if "{i}" in rule.mcore or rule.layers == "mtp"]
    single = [(i, rule) for i, rule in enumerate(rules) if rule not in per_layer]
    ordered: list[tuple[TensorRule, int]] = [(rule, 0) for i, rule in single if i < first_layer_rule]
    ordered += [
        (rule, layer) for layer in range(shape.num_layers) for rule in per_layer if is_in_layer(rule, layer, shape)
    ]
    ordered += [(rule, 0) for i, rule in single if i > first_layer_rule]
    further = range(shape.num_layers, shape.num_layers + shape.mtp_num_layers)
    ordered += [(rule, layer) for layer in further for rule in per_layer if is_in_layer(rule, layer, shape)]
    return [
        _pair(rule, layer, expert, shape)
        for rule, layer in ordered
        for expert in (range(shape.num_moe_experts) if "{e}" in rule.mcore else (0,))
    ]


def is_in_layer(rule: TensorRule, layer: int, shape: ModelShape) -> bool:
    """Whether a layer has this rule's tensor; prediction layers count on behind the last one."""
    if rule.layers == "mtp":
        return layer >= shape.num_layers
    return rule.layers == "all" or (rule.layers == "moe") == shape.is_moe_layer(layer)


def exists(rule: TensorRule, shape: ModelShape) -> bool:
    """Whether the shape has this rule's tensor, in some layer at least."""
    if not any(is_in_layer(rule, layer, shape) for layer in range(shape.num_layers + shape.mtp_num_layers)):
        return False
    if rule.when is None:
        return True
    negated, name = rule.when.startswith("not "), rule.when.removeprefix("not ")
    return bool(getattr(shape, name)) != negated


def absent_rules(shape: ModelShape) -> Iterator[tuple[TensorRule, str]]:
    """(rule, HF name of layer 0) of the tensors that this shape says do not exist: a file that has them disagrees."""
    for rule in get_family(shape.family).tensors:
        if not exists(rule, shape):
            for name in rule.hf:
                yield rule, name.replace("{i}", "0").replace("{e}", "0")


def _pair(rule: TensorRule, layer: int, expert: int, shape: ModelShape) -> TensorPair:
    def named(name: str) -> str:
        return name.replace("{i}", str(layer)).replace("{e}", str(expert))

    mcore = named(of_prediction(rule.mcore, layer - shape.num_layers) if layer >= shape.num_layers else rule.mcore)
    layout, dims = layouts.layout_of(mcore), layouts.full_shape(mcore, shape)
    hf_dims: tuple[tuple[int, ...], ...] = (dims,)
    if rule.transform == "parts":
        hf_dims = tuple((rows, *dims[1:]) for rows in packing.part_rows(layout.packing, shape))
    assert len(hf_dims) == len(rule.hf), f"{rule.mcore}: {len(rule.hf)} HF names for {len(hf_dims)} parts"
    copies = tuple(_copies(mcore, shape))
    assert not copies or rule.transform == "copy", f"{rule.mcore}: only a tensor that is one HF tensor has copies"
    return TensorPair(mcore, tuple(map(named, rule.hf)), rule.transform, layout, dims, hf_dims, copies)


def of_prediction(mcore: str, number: int) -> str:
    """The name in a multi-token prediction layer (from 0) of what a rule calls decoder.layers.{i}.x, or mtp...{m}.x."""
    return mcore.replace("decoder.layers.{i}.", "mtp.layers.{m}.transformer_layer.").replace("{m}", str(number))


def _copies(mcore: str, shape: ModelShape) -> Iterator[str]:
    """HF names of the copies of a tensor in the multi-token prediction layers."""
    for hf, original in get_family(shape.family).mtp_copies:
        tied = shape.tie_word_embeddings and original == "output_layer.weight"
        if mcore == ("embedding.word_embeddings.weight" if tied else original):
            for number in range(shape.mtp_num_layers):
                yield hf.replace("{i}", str(shape.num_layers + number))


def to_hf(pair: TensorPair, tensor: Array, shape: ModelShape) -> list[tuple[str, Array]]:
    """The HF tensors, by name, that an unsharded, unpadded mcore tensor is made of."""
    if pair.transform == "copy":
        return [(name, tensor) for name in (*pair.hf, *pair.hf_copies)]
    parts = packing.unpack(tensor, pair.layout.packing, shape)
    if pair.transform == "concatenated":
        return [(pair.hf[0], packing.concatenate(list(parts), 0))]
    return list(zip(pair.hf, parts))


def from_hf(pair: TensorPair, tensors: Sequence[Array], shape: ModelShape) -> Array:
    """The inverse of `to_hf`: the mcore tensor from the HF tensors in the order of `pair.hf`."""
    if pair.transform == "copy":
        return tensors[0]
    parts = tensors
    if pair.transform == "concatenated":
        bounds = [0]
        for rows in packing.part_rows(pair.layout.packing, shape):
            bounds.append(bounds[-1] + rows)
        parts = [tensors[0][start:stop] for start, stop in zip(bounds, bounds[1:])]
    return packing.pack(list(parts), pair.layout.packing, shape)
