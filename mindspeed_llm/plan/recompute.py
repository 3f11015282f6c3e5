"""What the recomputation options ask of a model's layers."""

from __future__ import annotations

from mindspeed_llm.config.recompute import RecomputeConfig
from mindspeed_llm.config.run import RunConfig, all_options
from mindspeed_llm.models.recompute_options import ALL_LAYERS, RecomputeOptions
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.plan.activations import WholeLayers

# Modules of --recompute-modules that our layers recompute; megatron-core does the others.
OWN_RECOMPUTE_MODULES = ("layernorm", "moe_act", "mla_up_proj")


def recompute_modules(r: RecomputeConfig) -> list[str]:
    """The parts of every layer that `--recompute-granularity selective` means; none otherwise."""
    return [] if r.recompute_granularity != "selective" else r.recompute_modules or ["core_attn"]


def megatron_modules(r: RecomputeConfig) -> list[str]:
    """Those of them that megatron-core recomputes."""
    return [name for name in recompute_modules(r) if name not in OWN_RECOMPUTE_MODULES]


def whole_layers(r: RecomputeConfig) -> WholeLayers:
    """Which layers `--recompute-granularity full` means."""
    if r.recompute_method == "block":
        return WholeLayers(count=r.recompute_num_layers or ALL_LAYERS)
    return WholeLayers(at_once=r.recompute_num_layers or 1)


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


def recompute_problems(config: RunConfig, shape: ModelShape) -> list[str]:
    """A line for each part that is to be recomputed and that no layer of the model has."""
    r, modules = config.recompute, recompute_modules(config.recompute)
    moe = [shape.is_moe_layer(layer) for layer in range(shape.num_layers)]
    absent = {
        "experts": (not any(moe), {"moe_act", "moe"}, {"moe_zero_memory": r.moe_zero_memory != "disable"}),
        "shared experts": (not shape.moe_shared_expert_intermediate_size, {"shared_experts"}, {}),
        "dense layers": (all(moe), {"mlp"}, {}),
        "latent attention": (
            not shape.multi_latent_attention,
            {"mla_up_proj"},
            {"mla_zero_memory": r.mla_zero_memory, "recompute_mla_up_proj": r.recompute_mla_up_proj},
        ),
    }
    problems = []
    for what, (is_absent, names, switches) in absent.items():
        given = [all_options()[name].flags[0] for name, on in switches.items() if on]
        given += [f"--recompute-modules {name}" for name in modules if name in names]
        if is_absent and given:
            problems.append(f"{', '.join(given)}: no meaning for a model without {what}; leave out")
    return problems
