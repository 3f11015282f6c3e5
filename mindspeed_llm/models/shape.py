"""The resolved architecture of a model, free of torch and megatron: what a checkpoint records and a builder reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ModelShape:
    """Everything that decides which function the network computes, apart from its weights.

    Names are megatron-core's TransformerConfig names where it has one. `family` names the table in
    `models/families/` through which tensors are mapped to Hugging Face.

    Args:
        rope_scaling: HF's rope parameters with `rope_type` in {"default", "linear", "dynamic", "llama3", "yarn",
            "longrope"}; None means plain RoPE. `rope_theta` stays in `rotary_base`.
        window_size: sliding-window width in tokens counting the token itself (HF's `sliding_window`), None for full
            attention.
        window_layers: indices of the layers that use the window; None means all of them.
        vocab_size: the tokenizer-independent size in config.json; padding for tensor parallelism is a layout matter.
        add_qkv_bias, add_attention_output_bias, add_mlp_bias: biases of the three groups of linears.
    """

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int
    norm_epsilon: float = 1e-5
    normalization: str = "RMSNorm"
    activation: str = "silu"
    gated_linear_unit: bool = True
    rotary_base: float = 10000.0
    rotary_percent: float = 1.0
    rope_scaling: Mapping[str, Any] | None = None
    add_qkv_bias: bool = False
    add_attention_output_bias: bool = False
    add_mlp_bias: bool = False
    qk_layernorm: bool = False
    tie_word_embeddings: bool = False
    window_size: int | None = None
    window_layers: tuple[int, ...] | None = None
    attention_dropout: float = 0.0
    init_method_std: float = 0.02
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A json-serialisable record, read back by `from_json`."""
        record = dataclasses.asdict(self)
        record["window_layers"] = None if self.window_layers is None else list(self.window_layers)
        record["rope_scaling"] = None if self.rope_scaling is None else dict(self.rope_scaling)
        record["extra"] = dict(self.extra)
        return record

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> ModelShape:
        """The shape recorded by `to_json`.

        Raises:
            ValueError: a field is missing or unknown (the record was written by another version).
        """
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(record) - known):
            raise ValueError(f"model shape: unknown fields {unknown} in the record; legal: {sorted(known)}")
        values = dict(record)
        if values.get("window_layers") is not None:
            values["window_layers"] = tuple(values["window_layers"])
        return cls(**values)

    def num_parameters(self) -> int:
        """Parameters of the unpadded model, tied embeddings counted once."""
        h, f, v, d = self.hidden_size, self.ffn_hidden_size, self.vocab_size, self.kv_channels
        q, kv = self.num_attention_heads * d, self.num_query_groups * d
        attention = h * (q + 2 * kv) + q * h
        attention += (q + 2 * kv) * self.add_qkv_bias + h * self.add_attention_output_bias + 2 * d * self.qk_layernorm
        fc1 = 2 * f if self.gated_linear_unit else f
        mlp = h * fc1 + f * h + (fc1 + h) * self.add_mlp_bias
        norm = h * (2 if self.normalization == "LayerNorm" else 1)
        return self.num_layers * (attention + mlp + 2 * norm) + norm + v * h * (1 if self.tie_word_embeddings else 2)
