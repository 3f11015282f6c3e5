"""The resolved architecture of a model, free of torch and megatron: what a checkpoint records and a builder reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_INDEX_TUPLES = ("window_layers", "moe_layers")


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
        attention_softcap: attention scores stay below it, softcap tanh(score / softcap); None for no bound.
        window_layers: indices of the layers that use the window; None means all of them.
        vocab_size: the tokenizer-independent size in config.json; padding for tensor parallelism is a layout matter.
        add_qkv_bias, add_attention_output_bias, add_mlp_bias: biases of the three groups of linears.
        num_moe_experts: routed experts of a mixture-of-experts layer; None for a dense model. The fields below are
            read only with it.
        moe_layers: indices of the layers with experts; None means all of them. The others have a dense MLP of
            `ffn_hidden_size`.
        moe_ffn_hidden_size: intermediate size of one routed expert.
        moe_shared_expert_intermediate_size: intermediate size of all shared experts together; None for none.
        moe_shared_expert_gate: a sigmoid gate on the shared experts' output.
        moe_router_topk: experts per token.
        moe_router_score_function: "softmax" or "sigmoid".
        moe_router_pre_softmax: softmax over all experts before the choice; False takes it over the chosen ones.
        norm_topk_prob: divide the chosen scores by their sum (no effect on a softmax over the chosen ones).
        moe_router_num_groups, moe_router_group_topk: the experts are chosen from the best `group_topk` of `num_groups`
            equal groups; None for no groups.
        moe_router_group_score_topk: how many of a group's best scores add up to the group's score; None is
            megatron-core's rule, topk / group_topk.
        moe_router_topk_scaling_factor: factor on the chosen scores; None for 1.
        moe_router_enable_expert_bias: a bias that takes part in the choice of experts but not in their weights.
        multi_latent_attention: keys and values come from a compressed latent. Then `kv_channels` is the width of a
            query or key head, qk_head_dim + qk_pos_emb_head_dim, and the five fields below are read.
        q_lora_rank: width of the queries' latent; None for queries straight from the hidden states.
        kv_lora_rank: width of the latent of keys and values.
        qk_head_dim: channels of a query or key head that are not rotated.
        qk_pos_emb_head_dim: rotated channels of a query head; the key's are shared by all heads.
        v_head_dim: width of a value head.
        latent_norm_epsilon: epsilon of the latents' norms; None for `norm_epsilon`.
        rotary_interleaved: neighbouring channels form the pairs that turn (multi-latent attention only).
        mtp_num_layers: multi-token prediction layers behind the last layer, each predicting one token further.
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
    num_moe_experts: int | None = None
    moe_layers: tuple[int, ...] | None = None
    moe_ffn_hidden_size: int | None = None
    moe_shared_expert_intermediate_size: int | None = None
    moe_shared_expert_gate: bool = False
    moe_router_topk: int = 2
    moe_router_score_function: str = "softmax"
    moe_router_pre_softmax: bool = False
    norm_topk_prob: bool = False
    moe_router_num_groups: int | None = None
    moe_router_group_topk: int | None = None
    moe_router_group_score_topk: int | None = None
    moe_router_topk_scaling_factor: float | None = None
    moe_router_enable_expert_bias: bool = False
    multi_latent_attention: bool = False
    q_lora_rank: int | None = None
    kv_lora_rank: int | None = None
    qk_head_dim: int | None = None
    qk_pos_emb_head_dim: int | None = None
    v_head_dim: int | None = None
    latent_norm_epsilon: float | None = None
    rotary_interleaved: bool = False
    mtp_num_layers: int = 0
    attention_softcap: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A json-serialisable record, read back by `from_json`."""
        record = dataclasses.asdict(self)
        for name in _INDEX_TUPLES:
            record[name] = None if record[name] is None else list(record[name])
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
        for name in _INDEX_TUPLES:
            if values.get(name) is not None:
                values[name] = tuple(values[name])
        return cls(**values)

    def is_moe_layer(self, layer: int) -> bool:
        """Whether the layer of that index (from 0) has experts instead of a dense MLP.

        Multi-token prediction layers, which count on behind the last layer, have experts if the model has any.
        """
        listed = self.moe_layers is None or layer in self.moe_layers or layer >= self.num_layers
        return self.num_moe_experts is not None and listed

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that are rotated."""
        if self.multi_latent_attention:
            return self.qk_pos_emb_head_dim
        return int(self.kv_channels * self.rotary_percent)

    @property
    def value_channels(self) -> int:
        """Width of a value head."""
        return self.v_head_dim if self.multi_latent_attention else self.kv_channels

    def num_parameters(self) -> int:
        """Parameters of the unpadded model, tied embeddings counted once; score biases, which are buffers, not."""
        h, v = self.hidden_size, self.vocab_size
        norm = h * (2 if self.normalization == "LayerNorm" else 1)
        mlps = sum(
            self.moe_parameters() if self.is_moe_layer(layer) else self.mlp_parameters()
            for layer in range(self.num_layers + self.mtp_num_layers)
        )
        layers = mlps + (self.num_layers + self.mtp_num_layers) * (self.attention_parameters() + 2 * norm)
        # eh_proj, enorm, hnorm, final_layernorm; embedding and output layer are the model's own.
        layers += self.mtp_num_layers * (2 * h * h + 3 * norm)
        return layers + norm + v * h * (1 if self.tie_word_embeddings else 2)

    def attention_parameters(self) -> int:
        """Parameters of one layer's attention."""
        if self.multi_latent_attention:
            return self._latent_attention_parameters()
        h, d = self.hidden_size, self.kv_channels
        q, kv = self.num_attention_heads * d, self.num_query_groups * d
        weights = h * (q + 2 * kv) + q * h
        return (
            weights + (q + 2 * kv) * self.add_qkv_bias + h * self.add_attention_output_bias + 2 * d * self.qk_layernorm
        )

    def _latent_attention_parameters(self) -> int:
        h, n = self.hidden_size, self.num_attention_heads
        queries = n * self.kv_channels
        query = h * queries if self.q_lora_rank is None else self.q_lora_rank * (h + queries + 1)
        down = h * (self.kv_lora_rank + self.qk_pos_emb_head_dim) + self.kv_lora_rank
        up = self.kv_lora_rank * n * (self.qk_head_dim + self.v_head_dim)
        return query + down + up + n * self.v_head_dim * h

    def mlp_parameters(self, ffn_hidden_size: int | None = None) -> int:
        """Parameters of one dense MLP (or of one expert, whose intermediate size is given)."""
        h, f = self.hidden_size, ffn_hidden_size or self.ffn_hidden_size
        fc1 = 2 * f if self.gated_linear_unit else f
        return h * fc1 + f * h + (fc1 + h) * self.add_mlp_bias

    def shared_expert_parameters(self) -> int:
        """Parameters of the shared experts of one layer and of their gate, 0 without."""
        if self.moe_shared_expert_intermediate_size is None:
            return 0
        gate = self.hidden_size * self.moe_shared_expert_gate
        return self.mlp_parameters(self.moe_shared_expert_intermediate_size) + gate

    def moe_parameters(self, experts: int | None = None) -> int:
        """Parameters of one mixture-of-experts layer: router, shared experts and `experts` routed ones (None: all)."""
        routed = (self.num_moe_experts if experts is None else experts) * self.mlp_parameters(self.moe_ffn_hidden_size)
        return self.num_moe_experts * self.hidden_size + routed + self.shared_expert_parameters()
