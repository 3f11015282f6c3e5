"""Options about experts: what they must equal in a model, a shape's fields from them alone, and what does not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mindspeed_llm.config.experts import ExpertConfig, layer_pattern
from mindspeed_llm.config.run import RunConfig, all_options
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.parallel.layout import ParallelLayout

# Options that are named like the shape's field.
SAME_NAMES = (
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "moe_shared_expert_gate",
    "moe_router_topk",
    "moe_router_score_function",
    "moe_router_pre_softmax",
    "norm_topk_prob",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_topk_scaling_factor",
    "moe_router_enable_expert_bias",
)
EXPERT_FACTS: dict[str, Callable[[ModelShape], Any]] = {
    "num_experts": lambda s: s.num_moe_experts,
    **{name: (lambda s, name=name: getattr(s, name)) for name in SAME_NAMES},
}
"""As `identity.FACTS`; `--moe-layer-freq` is compared layer by layer."""


def given_expert_options(config: RunConfig) -> list[str]:
    """Flags about experts that somebody gave."""
    return [o.flags[0] for name, o in all_options().items() if o.section == "experts" and name in config.given]


def layer_contradictions(config: RunConfig, shape: ModelShape, source: str) -> list[str]:
    """What is wrong with a given `--moe-layer-freq`."""
    text = config.experts.moe_layer_freq
    if "moe_layer_freq" not in config.given or shape.num_moe_experts is None:
        return []
    try:
        said = layer_pattern(text, shape.num_layers)
    except ValueError as wrong:
        return [f"--moe-layer-freq: {text} is wrong, because {wrong}; legal: a number, or terms like [0]*1+[1]*3"]
    true = [shape.is_moe_layer(layer) for layer in range(shape.num_layers)]
    return [] if said == true else [f"--moe-layer-freq: {text} contradicts {source}; leave the flag out"]


def expert_values(config: RunConfig) -> tuple[dict[str, Any], list[str]]:
    """(ModelShape fields from flags alone, problems); no fields without `--num-experts`."""
    e, m = config.experts, config.model
    if e.num_experts is None:
        return {}, []
    values = {name: value for name in SAME_NAMES if (value := config.get(name)) is not None}
    values.setdefault("moe_ffn_hidden_size", m.ffn_hidden_size)
    values["num_moe_experts"] = e.num_experts
    problems = []
    if e.moe_layer_freq is not None:
        try:
            layers = layer_pattern(e.moe_layer_freq, m.num_layers)
            values["moe_layers"] = None if all(layers) else tuple(i for i, has in enumerate(layers) if has)
        except ValueError as wrong:
            problems.append(f"--moe-layer-freq: {e.moe_layer_freq} is wrong, because {wrong}; legal: N, or [0]*1+[1]*3")
    topk, groups, chosen = values.get("moe_router_topk", 2), e.moe_router_num_groups, e.moe_router_group_topk
    sigmoid = e.moe_router_score_function == "sigmoid"
    if topk > e.num_experts:
        problems.append(
            f"--moe-router-topk: {topk} is more than --num-experts {e.num_experts}; legal: 1 to {e.num_experts}"
        )
    if topk == 1 and not sigmoid and not e.moe_router_pre_softmax:
        problems.append("--moe-router-pre-softmax is missing: the softmax over one chosen expert is always 1")
    if (groups is None) != (chosen is None):
        problems.append("--moe-router-num-groups and --moe-router-group-topk need each other")
    elif groups is not None and (
        e.num_experts % groups or chosen > groups or topk > chosen * (e.num_experts // groups)
    ):
        problems.append(
            f"--moe-router-num-groups: {chosen} of {groups} groups does not fit {topk} of {e.num_experts} experts"
        )
    if e.moe_router_enable_expert_bias and not sigmoid:
        problems.append("--moe-router-score-function sigmoid is missing: --moe-router-enable-expert-bias needs it")
    if e.moe_shared_expert_gate and e.moe_shared_expert_intermediate_size is None:
        problems.append("--moe-shared-expert-intermediate-size is missing: --moe-shared-expert-gate needs it")
    return values, problems


def expert_problems(config: RunConfig, shape: ModelShape, layout: ParallelLayout) -> list[str]:
    """Options about experts that do not go together, with the model, or with the layout."""
    e, p, t = config.experts, config.parallel, config.training
    if shape.num_moe_experts is None:
        given = given_expert_options(config) + ["--log-expert-load"] * config.logging.log_expert_load
        return [f"{', '.join(given)}: no meaning for a model without experts; leave out"] if given else []
    problems = []

    def refuse(condition: bool, line: str) -> None:
        if condition:
            problems.append(line)

    kinds, coefficients = e.moe_router_load_balancing_type, e.moe_aux_loss_coeff
    refuse(
        len(kinds) != len(coefficients) or len(set(kinds)) != len(kinds),
        f"--moe-aux-loss-coeff: {len(coefficients)} values for {len(kinds)} kinds in --moe-router-load-balancing-type; "
        "legal: one for each, no kind twice",
    )
    refuse(
        any(kind == "none" and value for kind, value in zip(kinds, coefficients)),
        "--moe-aux-loss-coeff: a coefficient for --moe-router-load-balancing-type none; legal: 0",
    )
    dropping = e.moe_expert_capacity_factor is not None
    for name in ("moe_pad_expert_input_to_capacity", "moe_token_drop_policy"):
        refuse(
            name in config.given and not dropping,
            f"{all_options()[name].flags[0]}: no meaning without --moe-expert-capacity-factor",
        )
    refuse(
        "moe_router_bias_update_rate" in config.given and not shape.moe_router_enable_expert_bias,
        "--moe-router-bias-update-rate: no meaning for a model without score biases",
    )
    training = config.door != "inference"
    refuse(
        training and layout.tp > 1 and not p.sequence_parallel,
        "--sequence-parallel is missing: with tensor parallelism every rank would route every token",
    )
    same_lengths = (config.door == "pretrain" and not t.pad_to_multiple_of) or t.pad_to_seq_length
    gathers = e.moe_token_dispatcher_type == "allgather"
    refuse(
        gathers and layout.pp > 1,
        "--moe-token-dispatcher-type: allgather does not go with pipeline stages; legal: alltoall",
    )
    refuse(
        gathers and layout.ep > 1 and not same_lengths,
        "--moe-token-dispatcher-type: allgather needs rows of one length on all ranks; legal: alltoall, or "
        "--no-padding-free --pad-to-seq-length",
    )
    refuse(
        e.moe_pad_expert_input_to_capacity and layout.ep * layout.expert_tp > 1 and not same_lengths,
        "--moe-pad-expert-input-to-capacity needs rows of one length on all ranks, which make one capacity; legal: "
        "--no-padding-free --pad-to-seq-length, or leave the flag out",
    )
    return problems + overlap_problems(e, shape, layout)


def overlap_problems(e: ExpertConfig, shape: ModelShape, layout: ParallelLayout) -> list[str]:
    """What stands against computing while tokens travel, where that is asked for."""
    shared, parts = e.moe_shared_expert_overlap, e.moe_alltoall_overlap_comm
    if not (shared or parts):
        return []
    flag = "--moe-alltoall-overlap-comm" if parts else "--moe-shared-expert-overlap"
    has_shared = bool(shape.moe_shared_expert_intermediate_size)
    lines = {
        "--moe-shared-expert-overlap is a part of --moe-alltoall-overlap-comm; give one": shared and parts,
        f"{flag}: allgather sends all tokens in one piece; legal: --moe-token-dispatcher-type alltoall": (
            e.moe_token_dispatcher_type != "alltoall"
        ),
        f"{flag} needs --expert-model-parallel-size of at least 2: tokens do not travel otherwise": layout.ep == 1,
        f"{flag}: no meaning for a model without shared experts; try: --moe-alltoall-overlap-comm": (
            not parts and not has_shared
        ),
        f"{flag}: there is nothing to compute while tokens travel, because a rank has one expert and the model no "
        f"shared ones; legal: --expert-model-parallel-size of at most {(shape.num_moe_experts or 0) // 2}": (
            parts and not has_shared and shape.num_moe_experts == layout.ep
        ),
    }
    return [line for line, holds in lines.items() if holds]
