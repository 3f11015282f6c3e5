"""config.json's fields about experts -> which layers have them, how wide the shared ones are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindspeed_llm.errors import UserError
from mindspeed_llm.models.family import Variant


def read_experts(config: Mapping[str, Any], variant: Variant, values: dict[str, Any]) -> set[str]:
    """Set moe_layers and the shared experts' size, and check what the table has set about experts.

    A model none of whose layers has experts becomes a dense one.

    Args:
        config: raw json of config.json.
        variant: says how the file names the layers (`Variant.experts`).
        values: ModelShape fields found so far; changed.

    Returns:
        Names of the fields that were understood.

    Raises:
        UserError: a field has an illegal value.
    """
    if variant.experts == "none":
        return set()
    rules = {"every_layer": _every_layer, "sparse_step": _sparse_step, "first_dense": _first_dense}
    layers, understood = rules[variant.experts]({**variant.expert_defaults, **config}, values)
    if len(layers) == 0 or values.get("num_moe_experts") is None:
        for name in [*values]:
            if name.startswith("moe_") or name in ("num_moe_experts", "norm_topk_prob"):
                del values[name]
        return understood
    values["moe_layers"] = None if set(layers) >= set(range(values["num_layers"])) else layers
    _check(values)
    return understood


def _every_layer(config: Mapping[str, Any], values: Mapping[str, Any]) -> tuple[tuple[int, ...], set[str]]:
    return tuple(range(values["num_layers"])), set()


def _sparse_step(config: Mapping[str, Any], values: Mapping[str, Any]) -> tuple[tuple[int, ...], set[str]]:
    """Qwen: every `decoder_sparse_step`-th layer, but for `mlp_only_layers`."""
    step = _whole(config, "decoder_sparse_step", 1, least=1)
    dense = config.get("mlp_only_layers") or ()
    layers = tuple(i for i in range(values["num_layers"]) if i not in dense and (i + 1) % step == 0)
    return layers, {"decoder_sparse_step", "mlp_only_layers"}


def _first_dense(config: Mapping[str, Any], values: dict[str, Any]) -> tuple[tuple[int, ...], set[str]]:
    """DeepSeek: from layer `first_k_dense_replace` on, every `moe_layer_freq`-th; "greedy" looks at no groups."""
    first = _whole(config, "first_k_dense_replace", 0, least=0)
    step = _whole(config, "moe_layer_freq", 1, least=1)
    shared = _whole(config, "n_shared_experts", 0, least=0)
    if shared:
        values["moe_shared_expert_intermediate_size"] = shared * values["moe_ffn_hidden_size"]
    # Multi-token prediction layers are numbered after the others.
    last = values["num_layers"] + values.get("mtp_num_layers", 0)
    layers = tuple(i for i in range(last) if i >= first and i % step == 0)
    if config.get("topk_method") == "greedy" or values.get("moe_router_num_groups") == 1:
        values["moe_router_num_groups"] = values["moe_router_group_topk"] = None
    return layers, {"first_k_dense_replace", "moe_layer_freq", "n_shared_experts"}


def _whole(config: Mapping[str, Any], name: str, default: int, least: int) -> int:
    value = config.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"config: {name}={value!r} in config.json is wrong; legal: a whole number from {least}")
    return value


def _check(values: Mapping[str, Any]) -> None:
    experts, topk = values["num_moe_experts"], values["moe_router_topk"]
    if topk > experts:
        raise UserError(f"config: {topk} experts per token is wrong, because there are {experts}")
    groups = values.get("moe_router_num_groups")
    if groups is None:
        return
    chosen = values.get("moe_router_group_topk")
    if experts % groups or chosen is None or not 1 <= chosen <= groups or topk > chosen * (experts // groups):
        raise UserError(
            f"config: {chosen} of {groups} groups of experts is wrong for {topk} of {experts} experts; legal: groups "
            "that divide the experts, and enough chosen ones to hold the experts of a token"
        )
