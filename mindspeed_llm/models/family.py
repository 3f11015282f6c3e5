"""What a model family is: a table from Hugging Face's config fields and tensor names to ours. No torch, no megatron.

Every module in `models/families/` that defines `FAMILY` is found by itself; adding a family is adding a file.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mindspeed_llm.errors import UserError
from mindspeed_llm.models import families as families_package


class Required:
    """Default of a config field that has none: its absence is an error."""


@dataclass(frozen=True)
class SameAs:
    """Default of a config field: the value of another field of the shape."""

    name: str


@dataclass(frozen=True)
class Quotient:
    """Default of a config field: one field of the shape divided by another, which must be exact."""

    numerator: str
    denominator: str


@dataclass(frozen=True)
class Sum:
    """Default of a config field: two fields of the shape together."""

    first: str
    second: str


@dataclass(frozen=True)
class ConfigField:
    """How one field of config.json reaches the shape.

    Args:
        to: the ModelShape fields it sets; a name starting with "extra." is a key of `ModelShape.extra`.
        default: value when the field is absent: a literal, SameAs, Quotient, Sum, or Required.
        null: value when the field is null; None keeps null itself (only for fields that may be None).
        legal: HF value -> shape value when only some values are implemented; any other is refused.
        aliases: other names of the field, which some versions of transformers write.
    """

    to: tuple[str, ...]
    default: Any = Required
    null: Any = Required
    legal: Mapping[Any, Any] | None = None
    aliases: tuple[str, ...] = ()


TRANSFORMS = ("copy", "parts", "concatenated")


@dataclass(frozen=True)
class TensorRule:
    """One megatron-core tensor and the HF tensors it is made of; `{i}` is the layer index and `{e}` the expert in both.

    Args:
        mcore: megatron-core name with the global layer index.
        hf: HF names.
        transform: "copy": the HF tensor is the mcore tensor. "parts": one HF tensor for each logical part of the mcore
            tensor (q, k, v; gate, up), which megatron-core interleaves or concatenates. "concatenated": one HF tensor
            that holds those parts one after another. All are invertible.
        when: the shape's field that says whether the tensor exists (true, or not None); "not x" for its negation.
        layers: "all", "moe" or "dense": the kind of layers that have the tensor; or "mtp": the multi-token prediction
            layers, whose number is `{m}` in the mcore name and which count on behind the last layer as `{i}` in HF's.
            The layer inside them has the tensors of the other kinds.
    """

    mcore: str
    hf: tuple[str, ...]
    transform: str = "copy"
    when: str | None = None
    layers: str = "all"


@dataclass(frozen=True)
class Variant:
    """One HF `model_type` served by a family.

    Args:
        architectures: HF classes whose weights have this family's names.
        fields: config.json name -> ConfigField.
        constants: shape values that this architecture hard-codes.
        rope_theta: base when config.json names none.
        partial_rotary_factor: default of that field where the architecture honours it; None where it does not.
        sliding_window: "none" (no such fields), "every_layer" (`sliding_window` alone decides), "by_layer"
            (`use_sliding_window`, `max_window_layers`, `layer_types`), or "refused" (those fields, but no window).
        sliding_window_default, max_window_layers_default: values when config.json names none.
        experts: which layers have experts: "none", "every_layer", "sparse_step" (`decoder_sparse_step`,
            `mlp_only_layers`), or "first_dense" (`first_k_dense_replace`, `moe_layer_freq`, and `n_shared_experts`
            as a multiple of the experts' size).
        expert_defaults: values of those fields when config.json names none.
    """

    model_type: str
    architectures: tuple[str, ...]
    fields: Mapping[str, ConfigField]
    constants: Mapping[str, Any] = field(default_factory=dict)
    rope_theta: float = 10000.0
    partial_rotary_factor: float | None = None
    sliding_window: str = "none"
    sliding_window_default: int | None = None
    max_window_layers_default: int = 0
    experts: str = "none"
    expert_defaults: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """A group of architectures with the same tensor names.

    Args:
        tensors: rules that together name every tensor once, on both sides.
        ignored_fields: further config.json fields without numeric meaning.
        optional_tensors: HF tensors that older files carry although they hold no weights (`{i}` allowed).
        mtp_copies: HF tensors of multi-token prediction layers that repeat a tensor of the model, and its mcore name.
    """

    name: str
    variants: tuple[Variant, ...]
    tensors: tuple[TensorRule, ...]
    ignored_fields: frozenset[str] = frozenset()
    optional_tensors: tuple[str, ...] = ()
    mtp_copies: tuple[tuple[str, str], ...] = ()


def all_families() -> dict[str, Family]:
    """name -> family, for every module of the package `models.families`."""
    found: dict[str, Family] = {}
    for module in pkgutil.iter_modules(families_package.__path__, families_package.__name__ + "."):
        family = getattr(importlib.import_module(module.name), "FAMILY", None)
        if family is not None:
            assert family.name not in found, f"family {family.name} is defined twice"
            found[family.name] = family
    return found


@functools.cache  # asked for with every tensor
def get_family(name: str) -> Family:
    """The family called `name`.

    Raises:
        UserError: there is none.
    """
    families = all_families()
    if name not in families:
        raise UserError(f"model family: {name!r} is unknown; legal: {', '.join(sorted(families))}")
    return families[name]


def family_of_model_type(model_type: str) -> tuple[Family, Variant]:
    """The family and variant that read a config.json with this `model_type`.

    Raises:
        UserError: no family serves it.
    """
    families = all_families().values()
    for family in families:
        for variant in family.variants:
            if variant.model_type == model_type:
                return family, variant
    legal = sorted(variant.model_type for family in families for variant in family.variants)
    raise UserError(
        f"config: model_type={model_type!r} in config.json is not served by any family; legal: {', '.join(legal)}; "
        f"try: add a file to mindspeed_llm/models/families/"
    )
