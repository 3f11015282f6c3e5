"""Options that repeat a fact of the architecture: what each must equal, and a shape built from them alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mindspeed_llm.config.run import RunConfig, all_options
from mindspeed_llm.models.shape import ModelShape

RopeKeys = {
    "rope_scaling_factor": "factor",
    "rope_scaling_original_max_position_embeddings": "original_max_position_embeddings",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
}

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
    "qk_layernorm": lambda s: s.qk_layernorm,
    "untie_embeddings_and_output_weights": lambda s: not s.tie_word_embeddings,
    "sliding_window": lambda s: s.window_size,
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
    return problems


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
    if not m.kv_channels and m.hidden_size % m.num_attention_heads:
        return None, [f"--kv-channels is missing: {m.num_attention_heads} heads do not divide {m.hidden_size}"]
    stretching = [all_options()[o].flags[0] for o in RopeKeys if config.get(o) is not None]
    if stretching and not m.rope_scaling_type:
        return None, [f"--rope-scaling-type is missing: {', '.join(stretching)} have no meaning without it"]
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
            kv_channels=m.kv_channels or m.hidden_size // m.num_attention_heads,
            vocab_size=m.vocab_size or vocab_size,
            max_position_embeddings=m.max_position_embeddings or config.data.seq_length or 4096,
            norm_epsilon=m.norm_epsilon or 1e-5,
            rotary_base=m.rotary_base or 10000.0,
            rotary_percent=m.rotary_percent or 1.0,
            rope_scaling=rope,
            add_qkv_bias=m.add_qkv_bias,
            add_attention_output_bias=m.add_dense_bias,
            qk_layernorm=m.qk_layernorm,
            tie_word_embeddings=not m.untie_embeddings_and_output_weights,
            window_size=m.sliding_window,
            attention_dropout=m.attention_dropout or 0.0,
            init_method_std=m.init_method_std or 0.02,
        ),
        [],
    )
