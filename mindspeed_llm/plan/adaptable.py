"""Which linears of a model can have an adapter: names, parts, sizes, and how they are cut. From the family's table.

A linear of megatron-core may be several of Hugging Face's (query, key and value are one matrix); these are its parts,
named as Hugging Face names them. A kind of linear exists in many layers and, in layers with experts, once per expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mindspeed_llm.models.family import TensorRule, get_family
from mindspeed_llm.models.layouts import full_shape, layout_of
from mindspeed_llm.models.mapping import exists, is_in_layer, of_prediction
from mindspeed_llm.models.packing import part_rows
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.models.tensor_names import expert_index, without_numbers

# Parts of a name that say where a linear is, but not which one: no two linears of a layer differ by them alone.
_PREFIXES = ("self_attention.", "mlp.", "embedding.")
# The parameter that stacks all experts of a layer in transformers 5, where their linears are no modules.
_STACKED = {"experts.linear_fc1": "gate_up_proj", "experts.linear_fc2": "down_proj"}
# Modules that transformers 5 calls otherwise than the files it loads.
_RENAMED = {".block_sparse_moe.": ".mlp."}
_CUTS = {0: "column", 1: "row", None: "replicated"}
# A matrix of a single row: the gate on the shared experts.
_NEVER = "gate_weight"


@dataclass(frozen=True)
class Adaptable:
    """One kind of linear.

    Args:
        module: megatron-core's name, with as much of the path as makes it unique: "linear_qkv", "experts.linear_fc1".
        parts: Hugging Face's name of each part -> (in, out) of the whole linear, in the order of its rows.
        cut: by tensor parallelism: "column", "row", "replicated", or "vocabulary" (by its tokens).
        packing: how the rows of the parts lie in the matrix, see `models.packing`.
        experts: how many of it a layer has, 0 for one that is not an expert's.
        layers: indices of the layers that have it, multi-token prediction layers counting on behind the last; None for
            a linear outside the layers.
        mcore: path in the whole model, with {i} for the layer and {e} for the expert.
        hf: part -> path of Hugging Face's linear, likewise.
        num_layers: layers of the model, prediction layers not counted.
    """

    module: str
    parts: Mapping[str, tuple[int, int]]
    cut: str
    packing: str
    experts: int
    layers: tuple[int, ...] | None
    mcore: str
    hf: Mapping[str, str]
    num_layers: int

    @property
    def in_features(self) -> int:
        """Of every part."""
        return next(iter(self.parts.values()))[0]

    @property
    def count(self) -> int:
        """How many of it the model has."""
        return (1 if self.layers is None else len(self.layers)) * (self.experts or 1)

    def places(self) -> Iterator[tuple[int, int]]:
        """(layer, expert) of each; 0 where there is none."""
        for layer in (0,) if self.layers is None else self.layers:
            for expert in range(self.experts or 1):
                yield layer, expert

    def path(self, layer: int = 0, expert: int = 0) -> str:
        """The linear in the whole model, e.g. "decoder.layers.3.mlp.experts.local_experts.5.linear_fc1"."""
        name = of_prediction(self.mcore, layer - self.num_layers) if layer >= self.num_layers else self.mcore
        return name.replace("{i}", str(layer)).replace("{e}", str(expert))

    def paths(self) -> Iterator[str]:
        """All of them."""
        for place in self.places():
            yield self.path(*place)

    def hf_path(self, part: str, layer: int = 0, expert: int = 0) -> str:
        """Hugging Face's linear, as its files call it, e.g. "model.layers.3.mlp.experts.5.gate_proj"."""
        return self.hf[part].replace("{i}", str(layer)).replace("{e}", str(expert))

    def stacked_path(self, layer: int = 0) -> str | None:
        """What transformers 5 makes of this linear of all experts, e.g. "model.layers.3.mlp.experts.down_proj"."""
        if not self.experts:
            return None
        first = self.hf_path(next(iter(self.parts)), layer)
        return f"{renamed(first).rsplit('.', 2)[0]}.{_STACKED[self.module]}"


def renamed(path: str) -> str:
    """The module of transformers 5 for a linear of Hugging Face's files."""
    for old, new in _RENAMED.items():
        path = path.replace(old, new)
    return path


def module_of(path: str) -> str:
    """The kind of linear (`Adaptable.module`) of a path in a model or in one rank's part of it."""
    name = without_numbers(path + ".weight").removesuffix(".weight").replace("local_experts.", "")
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def adaptable_linears(shape: ModelShape) -> list[Adaptable]:
    """Every kind of linear of a model, embedding and output layer included, in the order of the family's table."""
    rules = [rule for rule in get_family(shape.family).tensors if exists(rule, shape)]
    return [linear for rule in rules if (linear := _adaptable(rule, shape)) is not None]


def adaptable_modules(shape: ModelShape) -> dict[str, Adaptable]:
    """`adaptable_linears` by module."""
    return {linear.module: linear for linear in adaptable_linears(shape)}


def names_in_experts(shape: ModelShape) -> set[str]:
    """Parts that a family's experts and routers have: names that transformers 5 has taken from its modules."""
    rules = get_family(shape.family).tensors
    return {
        name.split(".")[-2]
        for rule in rules
        if "{e}" in rule.mcore or "router.weight" in rule.mcore
        for name in rule.hf
    }


def _adaptable(rule: TensorRule, shape: ModelShape) -> Adaptable | None:
    """The kind of linear whose weight a rule describes, if it is one."""
    every = range(shape.num_layers + shape.mtp_num_layers)
    inside = "{i}" in rule.mcore or rule.layers == "mtp"
    layers = tuple(layer for layer in every if is_in_layer(rule, layer, shape)) if inside else None
    mcore = rule.mcore.removesuffix(".weight")
    some = of_prediction(rule.mcore, 0) if rule.layers == "mtp" else rule.mcore
    some = some.replace("{i}", "0").replace("{e}", "0")
    if mcore == rule.mcore or len(full_shape(some, shape)) != 2 or rule.mcore.endswith(_NEVER):
        return None
    layout, (rows, width) = layout_of(some), full_shape(some, shape)
    outs = part_rows(layout.packing, shape) or (rows,)
    names = [name.removesuffix(".weight") for name in rule.hf]
    parts = {name.rsplit(".", 1)[-1]: (width, out) for name, out in zip(names, outs, strict=True)}
    cut = "vocabulary" if layout.packing == "vocab" else _CUTS[layout.tp_dim]
    if module_of(some.removesuffix(".weight")) == "word_embeddings":
        # Looked up by token: the vocabulary is what goes in.
        parts = {part: (out, width) for part, (width, out) in parts.items()}
    return Adaptable(
        module=module_of(some.removesuffix(".weight")),
        parts=parts,
        cut=cut,
        packing=layout.packing,
        experts=shape.num_moe_experts if expert_index(some) is not None else 0,
        layers=layers,
        mcore=mcore,
        hf=dict(zip(parts, names)),
        num_layers=shape.num_layers,
    )
