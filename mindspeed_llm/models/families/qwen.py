"""Qwen2, Qwen2.5 (biased q, k, v) and Qwen3 (normalised q and k), dense.

Source: transformers' Qwen2Config, Qwen3Config and their modelling files; defaults are theirs.
"""

from mindspeed_llm.models.families.llama import ATTENTION, COMMON_FIELDS, HF_LAYER, TENSORS
from mindspeed_llm.models.family import ConfigField, Family, SameAs, TensorRule, Variant

QWEN_FIELDS = {
    **COMMON_FIELDS,
    "num_key_value_heads": ConfigField(("num_query_groups",), default=32, null=SameAs("num_attention_heads")),
    "max_position_embeddings": ConfigField(("max_position_embeddings",), default=32768),
}

QWEN2 = Variant(
    model_type="qwen2",
    architectures=("Qwen2ForCausalLM",),
    fields=QWEN_FIELDS,
    constants={"add_qkv_bias": True},
    sliding_window="by_layer",
    sliding_window_default=4096,
    max_window_layers_default=28,
)

QWEN3 = Variant(
    model_type="qwen3",
    architectures=("Qwen3ForCausalLM",),
    fields={
        **QWEN_FIELDS,
        "head_dim": ConfigField(("kv_channels",), default=128),
        "attention_bias": ConfigField(("add_qkv_bias", "add_attention_output_bias"), default=False),
    },
    constants={"qk_layernorm": True},
    sliding_window="by_layer",
    sliding_window_default=4096,
    max_window_layers_default=28,
)

FAMILY = Family(
    name="qwen",
    variants=(QWEN2, QWEN3),
    tensors=(
        *TENSORS,
        TensorRule(ATTENTION + "q_layernorm.weight", (HF_LAYER + "self_attn.q_norm.weight",), when="qk_layernorm"),
        TensorRule(ATTENTION + "k_layernorm.weight", (HF_LAYER + "self_attn.k_norm.weight",), when="qk_layernorm"),
    ),
)
