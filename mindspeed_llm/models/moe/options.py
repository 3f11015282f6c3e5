"""How experts are computed and balanced while training; nothing here changes what a trained model computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mindspeed_llm.models.shape import ModelShape


@dataclass(frozen=True)
class ExpertOptions:
    """Fields under megatron-core's names, without their prefix `moe_`.

    Args:
        token_dispatcher_type: "alltoall" (tokens travel to their experts) or "allgather" (every rank gets all tokens).
        grouped_gemm: all local experts in one grouped matrix product per linear.
        permute_fusion: tokens are brought to their experts and back by ops.moe_permute, which `patches.apply` puts into
            megatron-core; otherwise by its own indexing.
        router_dtype: "fp32" or "fp64" for the router's logits; None is the model's type.
        router_load_balancing_type: kinds of load-balancing losses: aux_loss (micro-batch), seq_aux_loss (row),
            global_aux_loss (global batch so far), none.
        aux_loss_coeff: a coefficient for each of them.
        z_loss_coeff: of the squared log-sum-exp of the logits; None for none.
        router_bias_update_rate: step of the score bias after each global batch.
        expert_capacity_factor: an expert takes at most this times an even share of a rank's tokens; None drops none.
        pad_expert_input_to_capacity: it gets exactly that many.
        token_drop_policy: which tokens stay, "probs" (largest weights) or "position" (first ones).
        overlap: what is computed while tokens travel, as `ModelConfig.expert_overlap`; needs "alltoall".
    """

    token_dispatcher_type: str = "alltoall"
    grouped_gemm: bool = False
    permute_fusion: bool = False
    router_dtype: str | None = None
    router_load_balancing_type: tuple[str, ...] = ("none",)
    aux_loss_coeff: tuple[float, ...] = (0.0,)
    z_loss_coeff: float | None = None
    router_bias_update_rate: float = 1e-3
    expert_capacity_factor: float | None = None
    pad_expert_input_to_capacity: bool = False
    token_drop_policy: str = "probs"
    overlap: str = ""


def expert_fields(shape: ModelShape, options: ExpertOptions) -> dict[str, Any]:
    """Fields of megatron-core's TransformerConfig that describe experts; nothing but defaults for a dense model."""
    if shape.num_moe_experts is None:
        # TransformerConfig refuses variable sequence lengths together with its own default, experts or not.
        return {"moe_token_dispatcher_type": "alltoall"}
    return {
        "num_moe_experts": shape.num_moe_experts,
        "moe_ffn_hidden_size": shape.moe_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": shape.moe_shared_expert_intermediate_size,
        "moe_shared_expert_gate": shape.moe_shared_expert_gate,
        "moe_router_topk": shape.moe_router_topk,
        "moe_router_score_function": shape.moe_router_score_function,
        "moe_router_pre_softmax": shape.moe_router_pre_softmax,
        "moe_router_num_groups": shape.moe_router_num_groups,
        "moe_router_group_topk": shape.moe_router_group_topk,
        "moe_router_topk_scaling_factor": shape.moe_router_topk_scaling_factor,
        "moe_router_enable_expert_bias": shape.moe_router_enable_expert_bias,
        "moe_token_dispatcher_type": options.token_dispatcher_type,
        "moe_grouped_gemm": options.grouped_gemm,
        "moe_permute_fusion": options.permute_fusion,
        "moe_router_dtype": options.router_dtype,
        "moe_router_load_balancing_type": list(options.router_load_balancing_type),
        "moe_aux_loss_coeff": list(options.aux_loss_coeff),
        "moe_z_loss_coeff": options.z_loss_coeff,
        "moe_router_bias_update_rate": options.router_bias_update_rate,
        "moe_expert_capacity_factor": options.expert_capacity_factor,
        "moe_pad_expert_input_to_capacity": options.pad_expert_input_to_capacity,
        "moe_token_drop_policy": options.token_drop_policy,
        "expert_overlap": options.overlap,
    }
