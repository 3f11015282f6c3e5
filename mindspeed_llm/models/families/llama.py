"""Llama and what shares its tensor names and config: Llama 1-3.x, CodeLlama, Yi, Mistral, ...

Source: transformers' LlamaConfig, MistralConfig and their modelling files; defaults are theirs.
"""

from mindspeed_llm.models.family import ConfigField, Family, Quotient, SameAs, TensorRule, Variant

COMMON_FIELDS = {
    "num_hidden_layers": ConfigField(("num_layers",)),
    "hidden_size": ConfigField(("hidden_size",)),
    "intermediate_size": ConfigField(("ffn_hidden_size",)),
    "num_attention_heads": ConfigField(("num_attention_heads",)),
    "num_key_value_heads": ConfigField(
        ("num_query_groups",), default=SameAs("num_attention_heads"), null=SameAs("num_attention_heads")
    ),
    "head_dim": ConfigField(
        ("kv_channels",),
        default=Quotient("hidden_size", "num_attention_heads"),
        null=Quotient("hidden_size", "num_attention_heads"),
    ),
    "vocab_size": ConfigField(("vocab_size",)),
    "max_position_embeddings": ConfigField(("max_position_embeddings",), default=2048),
    "rms_norm_eps": ConfigField(("norm_epsilon",), default=1e-6),
    "hidden_act": ConfigField(("activation",), default="silu", legal={"silu": "silu", "swish": "silu"}),
    "tie_word_embeddings": ConfigField(("tie_word_embeddings",), default=False),
    "attention_dropout": ConfigField(("attention_dropout",), default=0.0),
    "initializer_range": ConfigField(("init_method_std",), default=0.02),
}

ATTENTION = "decoder.layers.{i}.self_attention."
MLP = "decoder.layers.{i}.mlp."
HF_LAYER = "model.layers.{i}."


def hf_parts(prefix: str, parts: tuple[str, ...], kind: str) -> tuple[str, ...]:
    """HF names of the separate tensors that make up one fused tensor."""
    return tuple(f"{HF_LAYER}{prefix}.{part}_proj.{kind}" for part in parts)


TENSORS = (
    TensorRule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",)),
    TensorRule("decoder.layers.{i}.input_layernorm.weight", (HF_LAYER + "input_layernorm.weight",)),
    TensorRule(ATTENTION + "linear_qkv.weight", hf_parts("self_attn", ("q", "k", "v"), "weight"), "parts"),
    TensorRule(ATTENTION + "linear_qkv.bias", hf_parts("self_attn", ("q", "k", "v"), "bias"), "parts", "add_qkv_bias"),
    TensorRule(ATTENTION + "linear_proj.weight", hf_parts("self_attn", ("o",), "weight")),
    TensorRule(ATTENTION + "linear_proj.bias", hf_parts("self_attn", ("o",), "bias"), when="add_attention_output_bias"),
    TensorRule("decoder.layers.{i}.pre_mlp_layernorm.weight", (HF_LAYER + "post_attention_layernorm.weight",)),
    TensorRule(MLP + "linear_fc1.weight", hf_parts("mlp", ("gate", "up"), "weight"), "parts"),
    TensorRule(MLP + "linear_fc1.bias", hf_parts("mlp", ("gate", "up"), "bias"), "parts", "add_mlp_bias"),
    TensorRule(MLP + "linear_fc2.weight", hf_parts("mlp", ("down",), "weight")),
    TensorRule(MLP + "linear_fc2.bias", hf_parts("mlp", ("down",), "bias"), when="add_mlp_bias"),
    TensorRule("decoder.final_layernorm.weight", ("model.norm.weight",)),
    TensorRule("output_layer.weight", ("lm_head.weight",), when="not tie_word_embeddings"),
)

LLAMA = Variant(
    model_type="llama",
    architectures=("LlamaForCausalLM", "LLaMAForCausalLM"),
    fields={
        **COMMON_FIELDS,
        "attention_bias": ConfigField(("add_qkv_bias", "add_attention_output_bias"), default=False),
        "mlp_bias": ConfigField(("add_mlp_bias",), default=False),
    },
)

MISTRAL = Variant(
    model_type="mistral",
    architectures=("MistralForCausalLM",),
    fields={
        **COMMON_FIELDS,
        "num_key_value_heads": ConfigField(("num_query_groups",), default=8, null=SameAs("num_attention_heads")),
        "max_position_embeddings": ConfigField(("max_position_embeddings",), default=131072),
    },
    sliding_window="every_layer",
    sliding_window_default=4096,
)

FAMILY = Family(
    name="llama",
    variants=(LLAMA, MISTRAL),
    tensors=TENSORS,
    # pretraining_tp splits HF's matmuls and adds the pieces: the same function
    ignored_fields=frozenset({"pretraining_tp"}),
    # buffers that conversions made before 2023-07 saved along with the weights
    optional_tensors=(HF_LAYER + "self_attn.rotary_emb.inv_freq",),
)
