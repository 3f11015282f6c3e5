"""Options of the architecture. Normally none is needed: config.json or the checkpoint record says it all."""

from __future__ import annotations

from mindspeed_llm.config.schema import TRAINING_DOORS, above, at_least, between, option, section


@section
class ModelConfig:
    """The model's shape; every value left out comes from `--load`, `--hf-config` or the family's defaults."""

    hf_config: str | None = option(
        help="config.json (or its directory) of the model to build from scratch; beside --load, of the same model",
        kind="identity",
    )
    model_type_hf: str | None = option(
        help="family of tables when no config.json names it (llama, qwen); upstream names like llama2 and qwen25 work",
        kind="identity",
        level="advanced",
    )
    num_layers: int | None = option(help="transformer layers", kind="identity", check=at_least(1))
    hidden_size: int | None = option(help="width of the residual stream", kind="identity", check=at_least(1))
    ffn_hidden_size: int | None = option(help="width of the MLP", kind="identity", check=at_least(1))
    num_attention_heads: int | None = option(help="query heads", kind="identity", check=at_least(1))
    group_query_attention: bool = option(help="key/value heads are shared; needs --num-query-groups", kind="identity")
    num_query_groups: int | None = option(
        help="key/value heads; default: as many as query heads", kind="identity", check=at_least(1)
    )
    kv_channels: int | None = option(
        help="width of a head; default: hidden size / heads", kind="identity", level="advanced", check=at_least(1)
    )
    vocab_size: int | None = option(
        help="tokens in the vocabulary, unpadded; default: the tokenizer's", kind="identity", check=at_least(2)
    )
    max_position_embeddings: int | None = option(
        help="longest sequence the positions are defined for; default: --seq-length", kind="identity", check=at_least(1)
    )
    position_embedding_type: str | None = option(
        help="rope; other kinds are refused", kind="identity", choices=("rope",), level="advanced"
    )
    rotary_base: float | None = option(
        help="theta of rotary embedding", kind="identity", check=above(0), level="advanced"
    )
    rotary_percent: float | None = option(
        help="share of a head that is rotated", kind="identity", check=between(0.01, 1), level="advanced"
    )
    rope_scaling_type: str | None = option(
        help="how positions are stretched",
        kind="identity",
        level="advanced",
        choices=("linear", "dynamic", "llama3", "yarn"),
    )
    rope_scaling_factor: float | None = option(
        help="stretching factor of --rope-scaling-type", kind="identity", level="advanced", check=at_least(1)
    )
    rope_scaling_original_max_position_embeddings: int | None = option(
        help="length the model was trained for before stretching",
        kind="identity",
        level="advanced",
        check=at_least(1),
        also=("--original-max-position-embeddings",),
    )
    low_freq_factor: float | None = option(help="llama3 stretching", kind="identity", level="expert", check=above(0))
    high_freq_factor: float | None = option(help="llama3 stretching", kind="identity", level="expert", check=above(0))
    beta_fast: float | None = option(help="yarn stretching", kind="identity", level="expert", check=above(0))
    beta_slow: float | None = option(help="yarn stretching", kind="identity", level="expert", check=above(0))
    rope_scaling_mscale: float | None = option(
        help="yarn stretching: temperature of the rotated channels", kind="identity", level="expert", check=at_least(0)
    )
    rope_scaling_mscale_all_dim: float | None = option(
        help="yarn stretching: temperature of all channels (of the scores, with latent attention)",
        kind="identity",
        level="expert",
        check=at_least(0),
    )
    normalization: str | None = option(help="kind of norm", kind="identity", choices=("RMSNorm", "LayerNorm"))
    norm_epsilon: float | None = option(
        help="epsilon of the norms", kind="identity", level="advanced", check=above(0), also=("--layernorm-epsilon",)
    )
    swiglu: bool = option(help="gated MLP with SiLU", kind="identity")
    disable_bias_linear: bool = option(help="no bias in attention output and MLP", kind="identity")
    add_qkv_bias: bool = option(help="bias in the query/key/value projection", kind="identity", level="advanced")
    add_dense_bias: bool = option(help="bias in the attention output projection", kind="identity", level="advanced")
    qk_layernorm: bool = option(help="norm of queries and keys per head", kind="identity", level="advanced")
    multi_latent_attention: bool = option(
        help="keys and values from a compressed latent (DeepSeek)",
        kind="identity",
        level="advanced",
        also=("--multi-head-latent-attention",),
    )
    q_lora_rank: int | None = option(
        help="latent attention: width of the queries' latent; default: queries have none",
        kind="identity",
        level="advanced",
        check=at_least(1),
    )
    kv_lora_rank: int | None = option(
        help="latent attention: width of the latent of keys and values",
        kind="identity",
        level="advanced",
        check=at_least(1),
    )
    qk_head_dim: int | None = option(
        help="latent attention: channels of a query or key head that are not rotated",
        kind="identity",
        level="advanced",
        check=at_least(1),
        also=("--qk-nope-head-dim",),
    )
    qk_pos_emb_head_dim: int | None = option(
        help="latent attention: rotated channels of a query or key head",
        kind="identity",
        level="advanced",
        check=at_least(2),
        also=("--qk-rope-head-dim",),
    )
    v_head_dim: int | None = option(
        help="latent attention: width of a value head", kind="identity", level="advanced", check=at_least(1)
    )
    mtp_num_layers: int | None = option(
        help="multi-token prediction layers behind the last layer; fewer than the checkpoint has leaves the others out",
        kind="identity",
        level="advanced",
        check=at_least(0),
        doors=(*TRAINING_DOORS, "inference", "convert"),
    )
    untie_embeddings_and_output_weights: bool = option(help="the output layer has weights of its own", kind="identity")
    sliding_window: int | None = option(
        help="attend to the last N tokens only", kind="identity", level="advanced", check=at_least(1)
    )
    attn_logit_softcapping: float | None = option(
        help="bound of attention scores: bound * tanh(score / bound)",
        kind="identity",
        level="advanced",
        check=above(0),
    )
    init_method_std: float | None = option(help="standard deviation of initial weights", check=above(0))
    attention_dropout: float | None = option(help="dropout of attention probabilities", check=between(0, 0.99))
    hidden_dropout: float = option(0.0, help="dropout after attention and MLP", check=between(0, 0.99))
    make_vocab_size_divisible_by: int = option(
        1,
        help="the vocabulary is padded to a multiple of this times the tensor-parallel size",
        level="advanced",
        check=at_least(1),
    )
    truncate_layers: int | None = option(
        help="load (convert) only the first N layers of the checkpoint, on purpose",
        level="advanced",
        check=at_least(1),
        doors=(*TRAINING_DOORS, "inference"),
    )
    ignore_config_field: list[str] | None = option(
        help="fields of config.json that may be unknown to the family's table",
        level="expert",
        doors=(*TRAINING_DOORS, "inference", "convert"),
    )
