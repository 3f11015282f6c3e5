"""Self-attention with a lean forward: split and rotate in one step, documents kept apart, a mask only if given."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Protocol

from megatron.core import parallel_state, tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from mindspeed_llm.models.config import ModelConfig
from mindspeed_llm.models.linear import ColumnParallelLinear, RowParallelLinear
from mindspeed_llm.models.norm import RMSNorm
from mindspeed_llm.models.recompute import keep, stream_of_rank, without_output
from mindspeed_llm.models.rope import softmax_scale
from mindspeed_llm.ops.attention import attention
from mindspeed_llm.ops.attention_masked import masked_attention
from mindspeed_llm.ops.rotary import apply_rotary, split_qkv_rotary
from mindspeed_llm.parallel.context_attention import ContextParallelAttention
from mindspeed_llm.parallel.setup import head_exchange_group


class KeyValueCache(Protocol):
    """What generation passes as `inference_context`: it stores keys and values of earlier positions."""

    def update(self, layer_number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append this call's rotated key [s, b, g, d] and value [s, b, g, d_v]; return all s_all of each, oldest first.

        The queries of the call are the last s of the s_all positions. Layers are numbered from 1, over the whole model.
        """


class CoreAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v of one layer; `ContextParallelAttention` takes its place, see `core_attention`."""

    def __init__(self, config: ModelConfig, layer_number: int):
        super().__init__()
        self.window_size = config.window_of_layer(layer_number)
        self.scale = softmax_scale(config.shape)
        self.softcap = config.shape.attention_softcap
        self.dropout = config.attention_dropout
        self.config = config

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """q [s, b, n, d], k [s_k, b, g, d], v [s_k, b, g, d_v] -> [s, b, n * d_v].

        Args:
            cu_seqlens: documents of a packed row, see ops.attention.
            hidden: a mask that takes the place of causal order, see ops.attention_masked.
        """
        dropout = self.dropout if self.training else 0.0
        # Heads differ between tensor-parallel ranks, so their masks come from the stream that differs too.
        with stream_of_rank(self.config) if dropout else nullcontext():
            if hidden is not None:
                if self.softcap is not None:
                    raise ValueError("attention with a mask has no soft cap")
                return masked_attention(query, key, value, hidden, dropout=dropout, scale=self.scale)
            return attention(
                query,
                key,
                value,
                cu_seqlens=cu_seqlens,
                window_size=self.window_size,
                dropout=dropout,
                scale=self.scale,
                softcap=self.softcap,
            )


def core_attention(config: ModelConfig, layer_number: int) -> CoreAttention | ContextParallelAttention:
    """The core attention of a layer: over the tokens at hand, or over those of all context-parallel ranks."""
    split = config.sequence_split
    if split.ranks == 1:
        return CoreAttention(config, layer_number)
    return ContextParallelAttention(
        split,
        parallel_state.get_context_parallel_group(),
        head_exchange_group(split.ulysses),
        ring_window=config.ring_window,
        window_size=config.window_of_layer(layer_number),
        scale=softmax_scale(config.shape),
    )


class CausalSelfAttention(MegatronModule):
    """[s, b, h] -> [s, b, h]: query_key_value of a kind of attention, then core_attention and linear_proj.

    Hooks for other rooms:
      - LoRA replaces the linears by modules called the same way, `(x) -> (out, bias)`.
      - Context parallelism has a core_attention of its own; all else here works on the tokens of this rank.
      - Generation passes a `KeyValueCache` as `inference_context`; positions come from `position_ids` through the
        rotary table, so decoding one token at position p needs nothing else.

    Args:
        value_channels: width of a head's value, all heads of which linear_proj takes.
    """

    def __init__(
        self, config: ModelConfig, layer_number: int, pg_collection: ProcessGroupCollection, value_channels: int
    ):
        super().__init__(config=config)
        self.layer_number = layer_number
        self.tp_group = pg_collection.tp
        self.pg_collection = pg_collection
        shape, tp = config.shape, pg_collection.tp.size()
        self.head_dim = shape.kv_channels
        self.num_attention_heads_per_partition = shape.num_attention_heads // tp
        self.num_query_groups_per_partition = shape.num_query_groups // tp
        self.linear_proj = RowParallelLinear(
            shape.num_attention_heads * value_channels,
            shape.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=shape.add_attention_output_bias,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=pg_collection.tp,
        )
        self.core_attention = core_attention(config, layer_number)
        self.checkpoint_core_attention = (
            config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        inference_context: KeyValueCache | None = None,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **unused_by_megatron: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of one layer.

        Args:
            hidden_states: [s, b, h] (a rank's share of s under sequence parallelism).
            attention_mask: bool [b or 1, 1, s, s] over the whole sequence, True where a query does not see a key; it
                takes the place of causal order. None for causal attention, windows and documents.
            inference_context: a KeyValueCache, or None.
            rotary_pos_emb: table of ops.rotary.rotary_table for these positions; None for no rotation.
            packed_seq_params: thd documents in a batch of one.
            unused_by_megatron: arguments of TransformerLayer that must be None.

        Returns:
            Output [s, b, h] and linear_proj's bias, which the layer adds.
        """
        if given := [name for name, value in unused_by_megatron.items() if value is not None]:
            raise ValueError(f"{', '.join(given)} cannot be given: nothing here reads it")
        others = (inference_context, packed_seq_params, self.core_attention.window_size)
        if attention_mask is not None and any(other is not None for other in others):
            raise ValueError("attention_mask goes without sliding window, packed documents and cache")
        (query, key, value), drop = self._projections(hidden_states, rotary_pos_emb)
        cu_seqlens = None if packed_seq_params is None else packed_seq_params.cu_seqlens_q
        if inference_context is not None:
            key, value = inference_context.update(self.layer_number, key, value)
        if self.checkpoint_core_attention and self.training:
            context = tensor_parallel.checkpoint(
                lambda q, k, v: self.core_attention(q, k, v, cu_seqlens, attention_mask), False, query, key, value
            )
        else:
            context = self.core_attention(query, key, value, cu_seqlens, attention_mask)
        drop(context)
        return self.linear_proj(context)

    def _projections(
        self, hidden_states: Tensor, table: Tensor | None
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Callable[[Tensor], None]]:
        """`query_key_value`, and what drops them: see `models.recompute.without_output`."""
        if self.config.recompute.latent == "all":
            return without_output(self.query_key_value, hidden_states, table)
        return self.query_key_value(hidden_states, table), keep

    def query_key_value(self, hidden_states: Tensor, table: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """[s, b, h] -> query [s, b, n, d], key [s, b, g, d] and value [s, b, g, d_v] of this rank, rotated."""
        raise NotImplementedError


class SelfAttention(CausalSelfAttention):
    """Attention with query groups: linear_qkv, q_layernorm and k_layernorm if any, rotation."""

    def __init__(
        self,
        config: ModelConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        **_attention_kind: Any,
    ):
        shape = config.shape
        super().__init__(config, layer_number, pg_collection, shape.kv_channels)
        self.linear_qkv = ColumnParallelLinear(
            shape.hidden_size,
            (shape.num_attention_heads + 2 * shape.num_query_groups) * shape.kv_channels,
            config=config,
            init_method=config.init_method,
            bias=shape.add_qkv_bias,
            gather_output=False,
            tp_group=pg_collection.tp,
        )
        self.q_layernorm = RMSNorm(config, shape.kv_channels, shape.norm_epsilon) if shape.qk_layernorm else None
        self.k_layernorm = RMSNorm(config, shape.kv_channels, shape.norm_epsilon) if shape.qk_layernorm else None

    def query_key_value(self, hidden_states: Tensor, table: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """[s, b, h] -> query [s, b, n, d], key and value [s, b, g, d] of this rank, normalised and rotated."""
        qkv, _ = self.linear_qkv(hidden_states)
        groups = self.num_query_groups_per_partition
        if self.q_layernorm is None:
            return split_qkv_rotary(qkv, groups, self.head_dim, table)
        query, key, value = split_qkv_rotary(qkv, groups, self.head_dim, None)
        query, key = self.q_layernorm(query), self.k_layernorm(key)
        if table is not None:
            query, key = apply_rotary(query, table), apply_rotary(key, table)
        return query, key, value
