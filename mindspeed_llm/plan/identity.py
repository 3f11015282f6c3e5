"""Options that repeat a fact of the architecture: what each must equal, and a shape built from them alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mindspeed_llm.config.run import RunConfig, all_options
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.plan.experts import EXPERT_FACTS, expert_values, layer_contradictions

RopeKeys = {
    "rope_scaling_factor": "factor",
    "rope_scaling_original_max_position_embeddings": "original_max_position_embeddings",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "rope_scaling_mscale": "mscale",
    "rope_scaling_mscale_all_dim": "mscale_all_dim",
}

# Sizes of multi-head latent attention, named alike as options and in the shape; the first may be left out.
LATENT_SIZES = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")

# What the shape says an option should be. A boolean that is given but False here is a contradiction.
FACTS: dict[str, Callable[[ModelShape], Any]] = {
    "num_layers": lambda s: s.num_layers,
    "hidden_size": lambda s: s.hidden_size,
    "ffn_hidden_size": lambda s: s.ffn_hidden_size,
    "num_attention_heads": lambda s: s.num_attention_heads,
    "group_query_attention": lambda s: s.num_query_groups < s.num_attention_heads,
    "num_query_groups": lambda s: s.num_query_groups,
    "kv_channels": lambda s: s.kv_channels,
    "vocab_size": lambda s: s.vocab_size,
    "max_position_embeddings": lambda s: s.max_position_embeddings,
    "position_embedding_type": lambda s: "rope",
    "rotary_base": lambda s: s.rotary_base,
    "rotary_percent": lambda s: s.rotary_percent,
    "rope_scaling_type": lambda s: (s.rope_scaling or {}).get("rope_type", "default"),
    **{option: (lambda s, key=key: (s.rope_scaling or {}).get(key)) for option, key in RopeKeys.items()},
    "normalization": lambda s: s.normalization,
    "norm_epsilon": lambda s: s.norm_epsilon,
    "swiglu": lambda s: s.gated_linear_unit and s.activation == "silu",
    "disable_bias_linear": lambda s: not (s.add_attention_output_bias or s.add_mlp_bias),
    "add_qkv_bias": lambda s: s.add_qkv_bias,
    "add_dense_bias": lambda s: s.add_attention_output_bias,
    # Megatron's flag also stands for the norms of the latents, which are always there.
    "qk_layernorm": lambda s: s.qk_layernorm or s.multi_latent_attention,
    "multi_latent_attention": lambda s: s.multi_latent_attention,
    **{name: (lambda s, name=name: getattr(s, name)) for name in LATENT_SIZES},
    "untie_embeddings_and_output_weights": lambda s: not s.tie_word_embeddings,
    "sliding_window": lambda s: s.window_size,
    "attn_logit_softcapping": lambda s: s.attention_softcap,
    **EXPERT_FACTS,
}


def contradictions(config: RunConfig, shape: ModelShape, source: str) -> list[str]:
    """Given architecture options that disagree with the shape read from `source`, a line each."""
    problems = []
    for name, fact in FACTS.items():
        if name not in config.given:
            continue
        said, true = config.get(name), fact(shape)
        if said != true:
            flag = all_options()[name].flags[0]
            problems.append(
                f"{flag}: {said} contradicts {source}, which says {true}; leave the flag out"
                + (" (--truncate-layers N loads the first N layers on purpose)" if name == "num_layers" else "")
            )
    return problems + layer_contradictions(config, shape, source)


def _latent_problems(config: RunConfig, family: str) -> list[str]:
    """What is missing or too much about multi-head latent attention and multi-token prediction."""
    m = config.model
    if m.multi_latent_attention != (family == "deepseek"):
        is_needed = "needs" if m.multi_latent_attention else "is missing for"
        return [f"--multi-latent-attention: {is_needed} --model-type-hf deepseek, not {family}"]
    if m.mtp_num_layers and not m.multi_latent_attention:
        return [
            "--mtp-num-layers: only DeepSeek's tables have such layers; try: --multi-latent-attention, or leave out"
        ]
    given = [name for name in LATENT_SIZES if config.get(name) is not None]
    if not m.multi_latent_attention:
        flags = ", ".join(all_options()[name].flags[0] for name in given)
        return [f"--multi-latent-attention is missing: {flags} have no meaning without it"] if given else []
    missing = [all_options()[name].flags[0] for name in LATENT_SIZES[1:] if name not in given]
    problems = [f"{flag} is missing: --multi-latent-attention needs it" for flag in missing]
    if m.group_query_attention:
        problems.append("--group-query-attention: latent attention gives each head a key; leave the flag out")
    if m.kv_channels:
        problems.append("--kv-channels: latent attention has --qk-head-dim and --qk-pos-emb-head-dim instead")
    if m.add_qkv_bias or m.add_dense_bias:
        problems.append("--add-qkv-bias, --add-dense-bias: latent attention has no biases; leave them out")
    return problems


def _head_width(config: RunConfig) -> int:
    """Channels of a query head."""
    m = config.model
    if m.multi_latent_attention:
        return m.qk_head_dim + m.qk_pos_emb_head_dim
    return m.kv_channels or m.hidden_size // m.num_attention_heads


# A from-scratch shape needs these; the booleans because leaving them out means something else upstream.
REQUIRED = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
REQUIRED_SWITCHES = ("swiglu", "disable_bias_linear")


def shape_from_options(config: RunConfig, family: str, vocab_size: int) -> tuple[ModelShape | None, list[str]]:
    """A shape from flags alone, or what is missing for it.

    Args:
        family: table of `models/families` the tensors will be named by.
        vocab_size: the tokenizer's, used when `--vocab-size` is not given.
    """
    m = config.model
    problems = [
        f"{all_options()[n].flags[0]} is missing: without --load or --hf-config the shape comes from flags"
        for n in (*REQUIRED, *REQUIRED_SWITCHES)
        if not config.get(n)
    ]
    if (m.normalization or "LayerNorm") != "RMSNorm":
        problems.append("--normalization RMSNorm is missing: the families here have no other norm")
    if m.group_query_attention and not m.num_query_groups:
        problems.append("--num-query-groups is missing: --group-query-attention needs it")
    if problems:
        return None, problems
    if m.num_query_groups and not m.group_query_attention and m.num_query_groups != m.num_attention_heads:
        return None, ["--group-query-attention is missing: --num-query-groups has no meaning without it"]
    if m.num_attention_heads % (m.num_query_groups or 1):
        return None, [f"--num-query-groups: {m.num_query_groups} does not divide {m.num_attention_heads} heads"]
    if wrong := _latent_problems(config, family):
        return None, wrong
    if not (m.kv_channels or m.multi_latent_attention) and m.hidden_size % m.num_attention_heads:
        return None, [f"--kv-channels is missing: {m.num_attention_heads} heads do not divide {m.hidden_size}"]
    stretching = [all_options()[o].flags[0] for o in RopeKeys if config.get(o) is not None]
    if stretching and not m.rope_scaling_type:
        return None, [f"--rope-scaling-type is missing: {', '.join(stretching)} have no meaning without it"]
    experts, wrong = expert_values(config)
    if wrong:
        return None, wrong
    rope = None
    if m.rope_scaling_type:
        rope = {"rope_type": m.rope_scaling_type}
        rope |= {key: config.get(o) for o, key in RopeKeys.items() if config.get(o) is not None}
    return (
        ModelShape(
            family=family,
            num_layers=m.num_layers,
            hidden_size=m.hidden_size,
            ffn_hidden_size=m.ffn_hidden_size,
            num_attention_heads=m.num_attention_heads,
            num_query_groups=m.num_query_groups or m.num_attention_heads,
            kv_channels=_head_width(config),
            vocab_size=m.vocab_size or vocab_size,
            max_position_embeddings=m.max_position_embeddings or config.data.seq_length or 4096,
            norm_epsilon=m.norm_epsilon or 1e-5,
            rotary_base=m.rotary_base or 10000.0,
            rotary_percent=m.rotary_percent or 1.0,
            rope_scaling=rope,
            add_qkv_bias=m.add_qkv_bias,
            add_attention_output_bias=m.add_dense_bias,
            qk_layernorm=m.qk_layernorm and not m.multi_latent_attention,
            multi_latent_attention=m.multi_latent_attention,
            **{name: config.get(name) for name in LATENT_SIZES},
            rotary_interleaved=m.multi_latent_attention,
            mtp_num_layers=m.mtp_num_layers or 0,
            **experts,
            tie_word_embeddings=not m.untie_embeddings_and_output_weights,
            window_size=m.sliding_window,
            attention_softcap=m.attn_logit_softcapping,
            attention_dropout=m.attention_dropout or 0.0,
            init_method_std=m.init_method_std or 0.02,
        ),
        [],
    )
