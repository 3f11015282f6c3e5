"""Options of mixture-of-experts models: their shape from scratch, and how experts are computed and balanced."""

from __future__ import annotations

from mindspeed_llm.config.schema import TRAINING_DOORS, above, at_least, option, section

LOAD_BALANCING_TYPES = ("aux_loss", "seq_aux_loss", "global_aux_loss", "none")


def layer_pattern(text: str, num_layers: int) -> list[bool]:
    """Which layers have experts: "2" for every second one from the first on, or "[0]*1+[1]*3" layer by layer.

    Raises:
        ValueError: it is neither, or describes another number of layers.
    """
    if text.isdigit() and int(text) > 0:
        return [layer % int(text) == 0 for layer in range(num_layers)]
    pattern: list[bool] = []
    for term in text.replace(" ", "").strip("()").split("+"):
        kind, _, count = term.partition("*")
        if kind not in ("[0]", "[1]") or not (count or "1").isdigit():
            raise ValueError(f"{term!r} is not [0] or [1], nor one of them times a number")
        pattern += [kind == "[1]"] * int(count or "1")
    if len(pattern) != num_layers:
        raise ValueError(f"it describes {len(pattern)} layers and the model has {num_layers}")
    return pattern


@section
class ExpertConfig:
    """Experts of a layer; the shape comes from `--load` or `--hf-config` unless the model is made of flags."""

    num_experts: int | None = option(help="routed experts of a layer", kind="identity", check=at_least(2))
    moe_layer_freq: str | None = option(
        help="layers with experts: N for every N-th from the first on, or [0]*1+[1]*3 layer by layer; default: all",
        kind="identity",
        level="advanced",
    )
    moe_ffn_hidden_size: int | None = option(
        help="width of an expert; default: --ffn-hidden-size",
        kind="identity",
        check=at_least(1),
        also=("--moe-intermediate-size",),
    )
    moe_shared_expert_intermediate_size: int | None = option(
        help="width of all shared experts together; default: there are none", kind="identity", check=at_least(1)
    )
    moe_shared_expert_gate: bool = option(
        help="a sigmoid gate on the shared experts", kind="identity", level="advanced", also=("--shared-expert-gate",)
    )
    moe_router_topk: int | None = option(help="experts of a token; default: 2", kind="identity", check=at_least(1))
    moe_router_score_function: str | None = option(
        help="what makes scores of the router's logits; default: softmax",
        kind="identity",
        level="advanced",
        choices=("softmax", "sigmoid"),
    )
    moe_router_pre_softmax: bool = option(
        help="softmax over all experts, then the choice; otherwise over the chosen ones",
        kind="identity",
        level="advanced",
    )
    norm_topk_prob: bool = option(
        help="divide the chosen scores by their sum", kind="identity", level="advanced", off="--no-norm-topk-prob"
    )
    moe_router_num_groups: int | None = option(
        help="groups of experts, of which the best --moe-router-group-topk are chosen from",
        kind="identity",
        level="advanced",
        check=at_least(1),
    )
    moe_router_group_topk: int | None = option(
        help="groups that a token's experts are chosen from", kind="identity", level="advanced", check=at_least(1)
    )
    moe_router_topk_scaling_factor: float | None = option(
        help="factor on the chosen scores",
        kind="identity",
        level="advanced",
        check=above(0),
        also=("--routed-scaling-factor",),
    )
    moe_router_enable_expert_bias: bool = option(
        help="a bias for the choice of experts, moved after each step towards even loads (needs sigmoid scores)",
        kind="identity",
        level="advanced",
    )
    moe_grouped_gemm: bool = option(
        help="one matrix product for all local experts; converting: stack them in weight1 and weight2",
        level="advanced",
        doors=(*TRAINING_DOORS, "inference", "convert"),
    )
    moe_permute_fusion: bool = option(
        True,
        help="sort tokens by expert and back by operators that sum in fp32; off is megatron-core's indexing",
        level="advanced",
        doors=TRAINING_DOORS,
        also=("--use-fused-moe-token-permute-and-unpermute",),
    )
    moe_token_dispatcher_type: str = option(
        "alltoall",
        help="alltoall sends tokens to their experts; allgather gives every rank all tokens (few experts, short rows)",
        choices=("alltoall", "allgather"),
        level="advanced",
        doors=TRAINING_DOORS,
    )
    moe_shared_expert_overlap: bool = option(
        help="compute shared experts while tokens travel to routed ones and back",
        level="advanced",
        doors=TRAINING_DOORS,
    )
    moe_alltoall_overlap_comm: bool = option(
        help="send the tokens of some of a rank's experts while others, and shared ones, compute",
        level="advanced",
        doors=TRAINING_DOORS,
    )
    moe_router_dtype: str | None = option(
        help="type of the router's logits; default: the model's", choices=("fp32", "fp64"), level="advanced"
    )
    moe_router_load_balancing_type: list[str] = option(
        ["aux_loss"],
        help="load-balancing losses: of a micro-batch (aux_loss), of a row (seq_aux_loss), of the global batch so far "
        "(global_aux_loss), or none",
        choices=LOAD_BALANCING_TYPES,
        level="advanced",
        doors=TRAINING_DOORS,
    )
    moe_aux_loss_coeff: list[float] = option(
        [0.0],
        help="coefficient of each of these losses; every micro-batch counts alike",
        check=at_least(0),
        level="advanced",
        doors=TRAINING_DOORS,
    )
    moe_z_loss_coeff: float | None = option(
        help="coefficient of the squared log-sum-exp of the router's logits",
        check=above(0),
        level="advanced",
        doors=TRAINING_DOORS,
    )
    moe_router_bias_update_rate: float = option(
        1e-3,
        help="step of the bias of --moe-router-enable-expert-bias",
        check=at_least(0),
        level="advanced",
        doors=TRAINING_DOORS,
    )
    moe_expert_capacity_factor: float | None = option(
        help="an expert takes at most this times an even share of a rank's tokens, so results depend on the layout; "
        "default: no token is dropped",
        check=above(0),
        level="expert",
        doors=TRAINING_DOORS,
    )
    moe_pad_expert_input_to_capacity: bool = option(
        help="every expert gets exactly as many tokens as it can take", level="expert", doors=TRAINING_DOORS
    )
    moe_token_drop_policy: str = option(
        "probs",
        help="which tokens a full expert keeps: the largest weights or the first positions",
        choices=("probs", "position"),
        level="expert",
        doors=TRAINING_DOORS,
    )
