"""The `args` that Megatron checkpoints carry: what Megatron-LM and MindSpeed-LLM read back from one of ours."""

from __future__ import annotations

from typing import Any

from mindspeed_llm.models.shape import ModelShape

ARGS_THAT_CHANGE_OUTPUTS = (
    "num_attention_heads",
    "norm_epsilon",
    "rotary_base",
    "rotary_percent",
    "swiglu",
    "untie_embeddings_and_output_weights",
    "moe_router_topk",
    "moe_router_score_function",
)
"""Arguments that a wrong config.json could contradict without any tensor having another shape."""


def megatron_args(shape: ModelShape) -> dict[str, Any]:
    """Architecture arguments under Megatron's names, as `--use-checkpoint-args` expects them."""
    scaling = shape.rope_scaling or {}
    return {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "group_query_attention": shape.num_query_groups != shape.num_attention_heads,
        "num_query_groups": shape.num_query_groups,
        "kv_channels": shape.kv_channels,
        "max_position_embeddings": shape.max_position_embeddings,
        "seq_length": shape.max_position_embeddings,
        "position_embedding_type": "rope",
        "add_position_embedding": True,
        "use_rotary_position_embeddings": True,
        "rotary_base": shape.rotary_base,
        "rotary_percent": shape.rotary_percent,
        "rope_scaling_type": scaling.get("rope_type"),
        "normalization": shape.normalization,
        "norm_epsilon": shape.norm_epsilon,
        "swiglu": shape.gated_linear_unit and shape.activation == "silu",
        "add_bias_linear": shape.add_attention_output_bias or shape.add_mlp_bias,
        "add_qkv_bias": shape.add_qkv_bias,
        "qk_layernorm": shape.qk_layernorm,
        "untie_embeddings_and_output_weights": not shape.tie_word_embeddings,
        "multi_latent_attention": shape.multi_latent_attention,
        "q_lora_rank": shape.q_lora_rank,
        "kv_lora_rank": shape.kv_lora_rank,
        "qk_head_dim": shape.qk_head_dim,
        "qk_pos_emb_head_dim": shape.qk_pos_emb_head_dim,
        "v_head_dim": shape.v_head_dim,
        "mtp_num_layers": shape.mtp_num_layers or None,
        **expert_args(shape),
    }


def expert_args(shape: ModelShape) -> dict[str, Any]:
    """Architecture arguments of a mixture-of-experts model; none for a dense one."""
    if shape.num_moe_experts is None:
        return {}
    pattern = [int(shape.is_moe_layer(layer)) for layer in range(shape.num_layers)]
    return {
        "num_experts": shape.num_moe_experts,
        "moe_layer_freq": pattern,
        "moe_ffn_hidden_size": shape.moe_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": shape.moe_shared_expert_intermediate_size,
        "moe_shared_expert_gate": shape.moe_shared_expert_gate,
        "moe_router_topk": shape.moe_router_topk,
        "moe_router_score_function": shape.moe_router_score_function,
        # megatron has no division by the sum of scores from a softmax, which is the softmax over the chosen ones
        "moe_router_pre_softmax": shape.moe_router_pre_softmax and not shape.norm_topk_prob,
        "moe_router_num_groups": shape.moe_router_num_groups,
        "moe_router_group_topk": shape.moe_router_group_topk,
        "moe_router_topk_scaling_factor": shape.moe_router_topk_scaling_factor,
        "moe_router_enable_expert_bias": shape.moe_router_enable_expert_bias,
    }
