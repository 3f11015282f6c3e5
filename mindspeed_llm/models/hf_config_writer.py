"""ModelShape -> config.json, for models whose shape came from flags: `hf_config` read backwards, and read again."""

from __future__ import annotations

import dataclasses
from typing import Any

from mindspeed_llm.errors import UserError
from mindspeed_llm.models.family import ConfigField, Variant, get_family
from mindspeed_llm.models.hf_config import shape_from_hf
from mindspeed_llm.models.shape import ModelShape


def hf_config_of(shape: ModelShape) -> dict[str, Any]:
    """The config.json that describes a model: reading it gives this shape.

    Raises:
        UserError: no model type of the family can say all of it; names what would be lost.
    """
    lost: list[str] = []
    for variant in get_family(shape.family).variants:
        config = _described(shape, variant)
        try:
            read = shape_from_hf(config)
        except UserError:
            continue
        differing = [
            item.name
            for item in dataclasses.fields(ModelShape)
            if item.name not in ("family", "extra") and getattr(read, item.name) != getattr(shape, item.name)
        ]
        if not differing:
            return config
        lost = differing if not lost or len(differing) < len(lost) else lost
    what = f"; {', '.join(lost)} would be lost" if lost else ""
    raise UserError(
        f"config: no config.json of family {shape.family} describes this model{what}; legal: what its models in "
        "transformers have; try: --hf-config DIR with a config.json instead of flags"
    )


def _described(shape: ModelShape, variant: Variant) -> dict[str, Any]:
    config: dict[str, Any] = {"model_type": variant.model_type, "architectures": [variant.architectures[0]]}
    for name, rule in variant.fields.items():
        known = [getattr(shape, target) for target in rule.to if not target.startswith("extra.")]
        if known and known[0] is not None:
            config[name] = _written(rule, known[0])
    config["rope_theta"] = shape.rotary_base
    if shape.rope_scaling is not None:
        config["rope_scaling"] = dict(shape.rope_scaling)
    if variant.partial_rotary_factor is not None:
        config["partial_rotary_factor"] = shape.rotary_percent
    return config | _window(shape, variant) | _experts(shape, variant)


def _written(rule: ConfigField, value: Any) -> Any:
    """What the file says for a value of the shape."""
    if rule.legal is None:
        return value
    return next((said for said, meant in rule.legal.items() if meant == value), value)


def _window(shape: ModelShape, variant: Variant) -> dict[str, Any]:
    if variant.sliding_window == "every_layer":
        return {"sliding_window": shape.window_size}
    if variant.sliding_window != "by_layer" or shape.window_size is None:
        return {}
    sliding = range(shape.num_layers) if shape.window_layers is None else shape.window_layers
    kinds = ["sliding_attention" if i in sliding else "full_attention" for i in range(shape.num_layers)]
    return {"use_sliding_window": True, "sliding_window": shape.window_size, "layer_types": kinds}


def _experts(shape: ModelShape, variant: Variant) -> dict[str, Any]:
    """Which layers have experts, and the shared ones' number where a file gives that instead of their size."""
    layers = range(shape.num_layers)
    dense = [i for i in layers if not shape.is_moe_layer(i)]
    if variant.experts == "sparse_step":
        return {"decoder_sparse_step": 1, "mlp_only_layers": dense}
    if variant.experts != "first_dense":
        return {}
    shared, size = shape.moe_shared_expert_intermediate_size or 0, shape.moe_ffn_hidden_size or 1
    return {"first_k_dense_replace": len(dense), "moe_layer_freq": 1, "n_shared_experts": shared // size or None}
