"""Transformer Engine's TransformerLayer: norm, self-attention, norm and feed-forward block, each added to its input."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mindspeed_llm.models.stand_ins.transformer_engine.pytorch import ops
from mindspeed_llm.models.stand_ins.transformer_engine.pytorch.attention import DotProductAttention
from mindspeed_llm.models.stand_ins.transformer_engine.pytorch.linear import Linear, multiply, weight_init
from mindspeed_llm.models.stand_ins.transformer_engine.pytorch.module.base import (
    TransformerEngineBaseModule,
    device_of,
)
from mindspeed_llm.models.stand_ins.transformer_engine.pytorch.norm import norm_parameter, normalize
from mindspeed_llm.models.stand_ins.transformer_engine.refusal import refuse

# Activation -> its operation, and how many times its output size it takes.
ACTIVATIONS = {
    "gelu": (ops.GELU, 1),
    "relu": (ops.ReLU, 1),
    "silu": (ops.SiLU, 1),
    "geglu": (ops.GEGLU, 2),
    "reglu": (ops.ReGLU, 2),
    "swiglu": (ops.SwiGLU, 2),
}
# Arguments of the layer that have one legal value here: megatron's own layers have the others.
FIXED = {
    "tp_group": None,
    "tp_size": 1,
    "sequence_parallel": False,
    "set_parallel_mode": False,
    "layer_type": "encoder",
    "parallel_attention_mlp": False,
    "apply_residual_connection_post_layernorm": False,
    "output_layernorm": False,
    "drop_path_rate": 0.0,
}


class _Normed(TransformerEngineBaseModule):
    """A norm, and matrices made of named parts that take its output or what comes of that."""

    def __init__(self, size: int, eps: float, normalization: str, zero_centered_gamma: bool, **common: Any):
        super().__init__()
        self.eps, self.normalization, self.zero_centered_gamma = eps, normalization, zero_centered_gamma
        self.dtype, self.device = common["params_dtype"] or torch.get_default_dtype(), common["device"]
        self.get_rng_state_tracker, self.rng_tracker_name = common["get_rng_state_tracker"], None
        self.fuse_wgrad_accumulation, self.use_bias = common["fuse_wgrad_accumulation"], common["bias"]
        one = functools.partial(nn.init.constant_, val=0.0 if zero_centered_gamma else 1.0)
        self.draw("layer_norm_weight", norm_parameter(size, self.dtype, self.device), one)
        if normalization == "LayerNorm":
            self.draw("layer_norm_bias", norm_parameter(size, self.dtype, self.device), nn.init.zeros_)
        else:
            self.layer_norm_bias = None

    def draw_matrix(self, prefix: str, rows: int, columns: int, init_method: Callable[[Tensor], Any] | None) -> None:
        """The parameters `<prefix>weight` [rows, columns] and `<prefix>bias` [rows]."""
        make = functools.partial(torch.empty, dtype=self.dtype, device=device_of(self.device))
        self.draw(f"{prefix}weight", nn.Parameter(make(rows, columns)), weight_init(self, init_method))
        if self.use_bias:
            self.draw(f"{prefix}bias", nn.Parameter(make(rows)), nn.init.zeros_)

    def normed(self, x: Tensor) -> Tensor:
        return normalize(
            self.normalization, x, self.layer_norm_weight, self.layer_norm_bias, self.eps, self.zero_centered_gamma
        )

    def product(self, x: Tensor, *prefixes: str) -> Tensor:
        """x times the matrices of that prefix, one below the other, and their biases."""
        weights = [getattr(self, f"{prefix}weight") for prefix in prefixes]
        biases = [getattr(self, f"{prefix}bias") for prefix in prefixes] if self.use_bias else None
        if len(prefixes) == 1:
            return multiply(x, weights[0], biases and biases[0], self.fuse_wgrad_accumulation)
        return F.linear(x, torch.cat(weights), None if biases is None else torch.cat(biases))


class _QueryKeyValue(_Normed):
    """x [..., h] -> query [..., n, d], key and value [..., g, d].

    Args:
        fused: one matrix, in which the rows of a group of queries, its key and its value follow each other
            (`interleaved`) or all queries, keys and values do; else one matrix each.
    """

    def __init__(
        self,
        size: int,
        heads: int,
        groups: int,
        head_dim: int,
        fused: bool,
        interleaved: bool,
        init: Any,
        **common: Any,
    ):
        super().__init__(size, **common)
        self.heads, self.groups, self.head_dim = heads, groups, head_dim
        self.interleaved = fused and interleaved
        rows = {"query_": heads, "key_": groups, "value_": groups}
        parts = {"": heads + 2 * groups} if fused else rows
        if not fused and common["fuse_wgrad_accumulation"]:
            raise refuse("fuse_wgrad_accumulation=True of three matrices", "fuse_qkv_params=True")
        self.prefixes = tuple(parts)
        for prefix, number in parts.items():
            self.draw_matrix(prefix, number * head_dim, size, init)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mixed = self.product(self.normed(x), *self.prefixes)
        if not self.interleaved:
            return mixed.unflatten(-1, (-1, self.head_dim)).split([self.heads, self.groups, self.groups], dim=-2)
        of_group = mixed.unflatten(-1, (self.groups, -1, self.head_dim))
        query, key, value = of_group.split([self.heads // self.groups, 1, 1], dim=-2)
        return query.flatten(-3, -2), key.squeeze(-2), value.squeeze(-2)


class _SelfAttention(nn.Module):
    def __init__(self, qkv: _QueryKeyValue, core: DotProductAttention, proj: Linear):
        super().__init__()
        self.layernorm_qkv, self.core_attention, self.proj = qkv, core, proj

    def forward(self, x: Tensor, mask: Any, **options: Any) -> Tensor:
        return self.proj(self.core_attention(*self.layernorm_qkv(x), mask, **options))


class LayerNormMLP(_Normed):
    """fc2(activation(fc1(norm(x)))) of x [..., h]."""

    def __init__(self, size: int, inner: int, activation: str, init: Any, output_init: Any, **common: Any):
        super().__init__(size, **common)
        if activation not in ACTIVATIONS:
            raise refuse(f"activation={activation}", ", ".join(ACTIVATIONS))
        kind, factor = ACTIVATIONS[activation]
        self.activation = kind()
        self.draw_matrix("fc1_", factor * inner, size, init)
        self.draw_matrix("fc2_", size, inner, output_init)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(self.activation(self.product(self.normed(x), "fc1_")), "fc2_")


class TransformerLayer(nn.Module):
    """x + dropout(attention(norm(x))), and that plus dropout(mlp(norm(of it))), of x [s, b, h] (or [b, s, h]).

    Of one rank; its parameters are called as Transformer Engine's.

    Raises:
        UserError: an argument asks for what megatron's own layers are for, or only Transformer Engine has.
    """

    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        num_attention_heads: int,
        num_gqa_groups: int | None = None,
        layernorm_epsilon: float = 1e-5,
        hidden_dropout: float = 0.1,
        attention_dropout: float = 0.1,
        init_method: Callable[[Tensor], Any] | None = None,
        output_layer_init_method: Callable[[Tensor], Any] | None = None,
        *,
        layer_number: int | None = None,
        kv_channels: int | None = None,
        self_attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None,
        params_dtype: torch.dtype | None = None,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        fuse_wgrad_accumulation: bool = False,
        fuse_qkv_params: bool = False,
        qkv_weight_interleaved: bool = True,
        zero_centered_gamma: bool = False,
        bias: bool = True,
        activation: str = "gelu",
        normalization: str = "LayerNorm",
        device: Any = "cuda",
        attn_input_format: str = "sbhd",
        **fixed: Any,
    ):
        super().__init__()
        for name, value in fixed.items():
            if name not in FIXED:
                raise refuse(f"the argument {name} of TransformerLayer", "a layer without it")
            if value != FIXED[name]:
                raise refuse(f"{name}={value} of TransformerLayer", f"{FIXED[name]}, or megatron's own layers")
        if attn_input_format not in ("sbhd", "bshd"):
            raise refuse(f"attn_input_format={attn_input_format} of TransformerLayer", "sbhd, bshd")
        groups, head_dim = num_gqa_groups or num_attention_heads, kv_channels or hidden_size // num_attention_heads
        drawn = {"params_dtype": params_dtype, "device": device, "get_rng_state_tracker": get_rng_state_tracker}
        drawn |= {"fuse_wgrad_accumulation": fuse_wgrad_accumulation, "bias": bias}
        normed = {"eps": layernorm_epsilon, "normalization": normalization, "zero_centered_gamma": zero_centered_gamma}
        heads = (num_attention_heads, groups, head_dim)
        self.hidden_dropout = hidden_dropout
        self.self_attention = _SelfAttention(
            _QueryKeyValue(
                hidden_size, *heads, fuse_qkv_params, qkv_weight_interleaved, init_method, **normed, **drawn
            ),
            DotProductAttention(
                num_attention_heads,
                head_dim,
                groups,
                attention_dropout,
                attn_input_format,
                self_attn_mask_type,
                window_size,
                get_rng_state_tracker=get_rng_state_tracker,
                layer_number=layer_number,
            ),
            Linear(num_attention_heads * head_dim, hidden_size, init_method=output_layer_init_method, **drawn),
        )
        inits = (init_method, output_layer_init_method)
        self.layernorm_mlp = LayerNormMLP(hidden_size, ffn_hidden_size, activation, *inits, **normed, **drawn)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        self_attn_mask_type: str | None = None,
        window_size: tuple[int, int] | None = None,
        **options: Any,
    ) -> Tensor:
        """[s, b, h] -> [s, b, h].

        Raises:
            UserError: one of the further options is given.
        """
        if given := [name for name, value in options.items() if value is not None]:
            raise refuse(f"the option {', '.join(given)} of TransformerLayer", "a call without it")
        attended = self.self_attention(
            hidden_states, attention_mask, attn_mask_type=self_attn_mask_type, window_size=window_size
        )
        hidden_states = hidden_states + F.dropout(attended, self.hidden_dropout, self.training)
        return hidden_states + F.dropout(self.layernorm_mlp(hidden_states), self.hidden_dropout, self.training)
