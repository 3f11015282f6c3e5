"""Multi-head latent attention: keys and values of all heads from one small latent, as in DeepSeek-V2 and V3.

    q_i   = [q_nope_i ; rotate(q_rope_i)]      from x, or from norm(x W_dq) when queries have a latent too
    c, r  = x W_dkv                            c: the latent of keys and values; r: rotated, the same for every head
    k_i   = [norm(c) W_uk_i ; rotate(r)]       v_i = norm(c) W_uv_i

Tensor parallelism cuts the up projections by heads; the down projections, which are small, are whole on every rank.
Source: arXiv 2405.04434, section 2.1; parameter names are those of megatron-core's MLASelfAttention.

Legend: s sequence, b batch, h hidden, n heads of this rank, t tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor, nn

from mindspeed_llm.models.attention import CausalSelfAttention
from mindspeed_llm.models.config import ModelConfig
from mindspeed_llm.models.linear import ColumnParallelLinear, linear
from mindspeed_llm.models.nf4_weight import Nf4Weight
from mindspeed_llm.models.norm import RMSNorm, new_parameter
from mindspeed_llm.models.recompute import without_output
from mindspeed_llm.ops.rotary import apply_interleaved_rotary, apply_rotary


class ReplicatedLinear(nn.Module):
    """x [..., in] -> x W^T [..., out], called like megatron's linears; every tensor-parallel rank holds all of W.

    Under sequence parallelism a rank sees its share of the tokens, so megatron sums the weight's gradient over the
    ranks. Otherwise all ranks compute the same gradient, provided that each of them receives the whole gradient of the
    output: that is the affair of whoever uses the output.
    """

    def __init__(self, config: ModelConfig, in_features: int, out_features: int):
        super().__init__()
        self.config = config
        weight = new_parameter((out_features, in_features), config)
        self.weight = Nf4Weight.like(weight) if config.quantized_linears else weight

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return linear(x, self.weight), None


class LatentAttention(CausalSelfAttention):
    """[s, b, h] -> [s, b, h]; linear_q_proj, or linear_q_down_proj, q_layernorm and linear_q_up_proj; and the rest."""

    def __init__(
        self, config: ModelConfig, layer_number: int, pg_collection: ProcessGroupCollection, **_attention_kind: Any
    ):
        shape = config.shape
        super().__init__(config, layer_number, pg_collection, shape.v_head_dim)
        epsilon = shape.norm_epsilon if shape.latent_norm_epsilon is None else shape.latent_norm_epsilon
        query_channels = shape.num_attention_heads * shape.kv_channels
        if shape.q_lora_rank is None:
            self.linear_q_proj = self._by_heads(shape.hidden_size, query_channels)
        else:
            self.linear_q_down_proj = ReplicatedLinear(config, shape.hidden_size, shape.q_lora_rank)
            self.q_layernorm = RMSNorm(config, shape.q_lora_rank, epsilon)
            self.linear_q_up_proj = self._by_heads(shape.q_lora_rank, query_channels)
        latent_channels = shape.kv_lora_rank + shape.qk_pos_emb_head_dim
        self.linear_kv_down_proj = ReplicatedLinear(config, shape.hidden_size, latent_channels)
        self.kv_layernorm = RMSNorm(config, shape.kv_lora_rank, epsilon)
        both = shape.num_attention_heads * (shape.qk_head_dim + shape.v_head_dim)
        self.linear_kv_up_proj = self._by_heads(shape.kv_lora_rank, both)
        self.rotate = apply_interleaved_rotary if shape.rotary_interleaved else apply_rotary

    def _by_heads(self, in_features: int, out_features: int) -> ColumnParallelLinear:
        return ColumnParallelLinear(
            in_features,
            out_features,
            config=self.config,
            init_method=self.config.init_method,
            bias=False,
            gather_output=False,
            tp_group=self.tp_group,
        )

    def query_key_value(self, hidden_states: Tensor, table: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """[s, b, h] -> query and key [s, b, n, kv_channels], value [s, b, n, v_head_dim] of this rank's heads."""
        return self.from_latents(*self.latents(hidden_states), table)

    def _projections(
        self, hidden_states: Tensor, table: Tensor | None
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Callable[[Tensor], None]]:
        if self.config.recompute.latent == "up":
            return without_output(self.from_latents, *self.latents(hidden_states), table)
        return super()._projections(hidden_states, table)

    def latents(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """[s, b, h] -> latent of queries (or the input, where they have none) and what linear_kv_down_proj makes."""
        query = hidden_states
        if self.config.shape.q_lora_rank is not None:
            query, _ = self.linear_q_down_proj(hidden_states)
        return query, self.linear_kv_down_proj(hidden_states)[0]

    def from_latents(
        self, query_latent: Tensor, compressed: Tensor, table: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`latents` -> query, key, value."""
        shape, heads = self.config.shape, self.num_attention_heads_per_partition
        plain, rotated = shape.qk_head_dim, shape.qk_pos_emb_head_dim
        query = self._query(query_latent).unflatten(-1, (heads, plain + rotated))
        latent, shared_key = compressed.split((shape.kv_lora_rank, rotated), dim=-1)
        key_value, _ = self.linear_kv_up_proj(self.kv_layernorm(latent))
        plain_key, value = key_value.unflatten(-1, (heads, -1)).split((plain, shape.v_head_dim), dim=-1)
        plain_query, turning_query = query.split((plain, rotated), dim=-1)
        turning_key = self._on_every_rank(shared_key).unsqueeze(2)
        if table is not None:
            turning_query, turning_key = self.rotate(turning_query, table), self.rotate(turning_key, table)
        query = torch.cat((plain_query, turning_query), dim=-1)
        key = torch.cat((plain_key, turning_key.expand(-1, -1, heads, -1)), dim=-1)
        return query, key, value.contiguous()

    def _query(self, latent: Tensor) -> Tensor:
        """[s, b, n * kv_channels]."""
        if self.config.shape.q_lora_rank is None:
            return self.linear_q_proj(latent)[0]
        return self.linear_q_up_proj(self.q_layernorm(latent))[0]

    def _on_every_rank(self, shared_key: Tensor) -> Tensor:
        """The rotated channels of all tokens, used by the heads of every rank: their gradients are summed."""
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(shared_key, group=self.tp_group)
        return copy_to_tensor_model_parallel_region(shared_key, group=self.tp_group)
