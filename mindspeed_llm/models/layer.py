"""A decoder layer: megatron-core's, whose norm before the MLP is computed together with the sum it normalises."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from mindspeed_llm.models.norm import RMSNorm


class SumAndNorm:
    """Takes the place of megatron's bias-dropout-add after attention, where nothing is dropped.

    Called like it: with whether the model trains and whether to fuse, for a function of the layer's output with its
    bias, the residual and the probability of dropout.
    """

    def __init__(self, norm: RMSNorm):
        self.norm = norm

    def __call__(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        return self.add

    def add(self, output_and_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
        """The sum, of the output's dtype; its norm is what self.norm returns for it next."""
        output, bias = output_and_bias
        if bias is not None:
            output = output + bias
        return self.norm.of_sum(output, residual.to(output.dtype))


class DecoderLayer(TransformerLayer):
    """[s, b, h] -> [s, b, h]; megatron's layer in everything but that sum."""

    def __init__(self, *arguments: Any, **keywords: Any):
        super().__init__(*arguments, **keywords)
        # megatron enables gradients around its sums, for its fused ones: in generation and in the first pass of
        # recomputation the norm would save tensors for a backward pass that does not come.
        self.bias_dropout_add_exec_handler = nullcontext
        if isinstance(self.pre_mlp_layernorm, RMSNorm) and not self.hidden_dropout:
            self.self_attn_bda = SumAndNorm(self.pre_mlp_layernorm)
