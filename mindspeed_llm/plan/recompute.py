"""What the recomputation options ask of a model's layers."""

from __future__ import annotations

from mindspeed_llm.config.recompute import RecomputeConfig
from mindspeed_llm.models.recompute_options import ALL_LAYERS, RecomputeOptions

# Modules of --recompute-modules that our layers recompute; megatron-core does the others.
OWN_RECOMPUTE_MODULES = ("layernorm", "moe_act", "mla_up_proj")


def recompute_modules(r: RecomputeConfig) -> list[str]:
    """The parts of every layer that `--recompute-granularity selective` means; none otherwise."""
    return [] if r.recompute_granularity != "selective" else r.recompute_modules or ["core_attn"]


def megatron_modules(r: RecomputeConfig) -> list[str]:
    """Those of them that megatron-core recomputes."""
    return [name for name in recompute_modules(r) if name not in OWN_RECOMPUTE_MODULES]


def recompute_options(r: RecomputeConfig) -> RecomputeOptions:
    """In how many layers which parts are recomputed, from the options of both families."""

    def layers(on: bool, number: int | None = None) -> int:
        return (number or ALL_LAYERS) if on else 0

    modules = recompute_modules(r)
    up = r.recompute_mla_up_proj or "mla_up_proj" in modules
    return RecomputeOptions(
        norm=layers("layernorm" in modules) or layers(r.recompute_norm, r.recompute_norm_num_layers),
        activation=layers(r.recompute_activation_function, r.recompute_activation_function_num_layers),
        expert_activation=layers("moe_act" in modules),
        experts=layers(r.moe_zero_memory == "level0", r.moe_zero_memory_num_layers),
        expert_layer=layers(r.moe_zero_memory == "level1", r.moe_zero_memory_num_layers),
        latent="all" if r.mla_zero_memory else "up" if up else "",
        per_rank=r.enable_recompute_layers_per_pp_rank,
    )
