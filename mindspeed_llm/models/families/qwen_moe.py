"""Qwen1.5-MoE and Qwen2-MoE (shared expert with a gate, biased q, k, v) and Qwen3-MoE (normalised q and k).

Source: transformers' Qwen2MoeConfig, Qwen3MoeConfig and their modelling files; defaults are theirs.
"""

import dataclasses

from mindspeed_llm.models.families.llama import ATTENTION, HF_LAYER, MLP, TENSORS
from mindspeed_llm.models.families.qwen import QWEN_FIELDS
from mindspeed_llm.models.family import ConfigField, Family, SameAs, TensorRule, Variant

EXPERT = MLP + "experts.local_experts.{e}."
SHARED = MLP + "shared_experts."
HF_MLP = HF_LAYER + "mlp."
HAS_SHARED = "moe_shared_expert_intermediate_size"


def moe_fields(num_experts: int, topk: int, expert_size: int) -> dict[str, ConfigField]:
    """The fields about experts that both generations have, with a generation's defaults."""
    return {
        "num_experts": ConfigField(("num_moe_experts",), default=num_experts, aliases=("num_local_experts",)),
        "num_experts_per_tok": ConfigField(("moe_router_topk",), default=topk),
        "moe_intermediate_size": ConfigField(("moe_ffn_hidden_size",), default=expert_size),
        "norm_topk_prob": ConfigField(("norm_topk_prob",), default=False),
    }


def expert_tensors(hf_mlp: str) -> tuple[TensorRule, ...]:
    """Rules of router and experts under Qwen's names, which others share."""
    return (
        TensorRule(MLP + "router.weight", (hf_mlp + "gate.weight",), layers="moe"),
        TensorRule(
            EXPERT + "linear_fc1.weight",
            (hf_mlp + "experts.{e}.gate_proj.weight", hf_mlp + "experts.{e}.up_proj.weight"),
            "parts",
            layers="moe",
        ),
        TensorRule(EXPERT + "linear_fc2.weight", (hf_mlp + "experts.{e}.down_proj.weight",), layers="moe"),
    )


QWEN2_MOE = Variant(
    model_type="qwen2_moe",
    architectures=("Qwen2MoeForCausalLM",),
    fields={
        **QWEN_FIELDS,
        **moe_fields(num_experts=60, topk=4, expert_size=1408),
        "num_key_value_heads": ConfigField(("num_query_groups",), default=16, null=SameAs("num_attention_heads")),
        "shared_expert_intermediate_size": ConfigField((HAS_SHARED,), default=5632),
        "qkv_bias": ConfigField(("add_qkv_bias",), default=True),
    },
    constants={"moe_router_pre_softmax": True, "moe_shared_expert_gate": True},
    sliding_window="refused",
    experts="sparse_step",
)

QWEN3_MOE = Variant(
    model_type="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    fields={
        **QWEN_FIELDS,
        **moe_fields(num_experts=128, topk=8, expert_size=768),
        "num_key_value_heads": ConfigField(("num_query_groups",), default=4, null=SameAs("num_attention_heads")),
        "attention_bias": ConfigField(("add_qkv_bias", "add_attention_output_bias"), default=False),
    },
    constants={"moe_router_pre_softmax": True, "qk_layernorm": True},
    sliding_window="refused",
    experts="sparse_step",
)

FAMILY = Family(
    name="qwen_moe",
    variants=(QWEN2_MOE, QWEN3_MOE),
    tensors=(
        *(dataclasses.replace(rule, layers="dense") if rule.mcore.startswith(MLP) else rule for rule in TENSORS),
        TensorRule(ATTENTION + "q_layernorm.weight", (HF_LAYER + "self_attn.q_norm.weight",), when="qk_layernorm"),
        TensorRule(ATTENTION + "k_layernorm.weight", (HF_LAYER + "self_attn.k_norm.weight",), when="qk_layernorm"),
        *expert_tensors(HF_MLP),
        TensorRule(
            SHARED + "linear_fc1.weight",
            (HF_MLP + "shared_expert.gate_proj.weight", HF_MLP + "shared_expert.up_proj.weight"),
            "parts",
            HAS_SHARED,
            "moe",
        ),
        TensorRule(
            SHARED + "linear_fc2.weight", (HF_MLP + "shared_expert.down_proj.weight",), when=HAS_SHARED, layers="moe"
        ),
        TensorRule(
            SHARED + "gate_weight", (HF_MLP + "shared_expert_gate.weight",), when="moe_shared_expert_gate", layers="moe"
        ),
    ),
    ignored_fields=frozenset({"router_aux_loss_coef", "output_router_logits"}),
)
