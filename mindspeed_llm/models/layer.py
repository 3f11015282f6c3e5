"""A decoder layer: megatron-core's, whose norm before the MLP is computed together with the sum it normalises."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from mindspeed_llm.models.norm import RMSNorm
from mindspeed_llm.models.recompute import is_chosen, keep
from mindspeed_llm.models.recompute_options import RecomputeOptions


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
        self._recompute(self.config.recompute, keywords.get("vp_stage"))
        if isinstance(self.pre_mlp_layernorm, RMSNorm) and not self.hidden_dropout:
            self.self_attn_bda = SumAndNorm(self.pre_mlp_layernorm)

    def _recompute(self, options: RecomputeOptions, vp_stage: int | None) -> None:
        """Choose what this layer computes once more in the backward pass."""

        def chosen(count: int) -> bool:
            return is_chosen(self.config, self.layer_number, vp_stage, count)

        if chosen(options.norm):
            for norm, user in ((self.input_layernorm, self.self_attention), (self.pre_mlp_layernorm, self.mlp)):
                norm.recomputed = True
                if user is self.mlp and self.recompute_mlp:
                    # Inside of what is recomputed there is no output with a gradient: it is dropped behind that.
                    self.mlp_bda = _dropping(norm, self.mlp_bda)
                else:
                    user.register_forward_hook(partial(_drop_norm, norm))
        if isinstance(self.mlp, MoELayer):
            self.mlp.moe_layer_recompute |= chosen(options.expert_layer)
            self.mlp.experts.recompute_all = chosen(options.experts)
            self.mlp.experts.recompute_activation = chosen(max(options.activation, options.expert_activation))
            if self.mlp.shared_experts is not None:
                self.mlp.shared_experts.recompute_activation = chosen(options.activation)
        else:
            self.mlp.recompute_activation = chosen(options.activation)


def _drop_norm(norm: nn.Module, _user: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor | None]) -> None:
    """Forward hook of the module behind a norm, which is the only one that uses its output."""
    _drop_before(norm, output[0])


def _drop_before(norm: nn.Module, later: Tensor) -> None:
    """Give a norm's output back until the gradient of `later` is known."""
    norm.drop(later)
    norm.drop = keep


def _dropping(norm: nn.Module, sums: Callable[[bool, bool], Callable[..., Tensor]]) -> Callable[..., Any]:
    """megatron's bias-dropout-add behind an MLP, before which the output of the norm in front of that is dropped."""

    def sum_of(training: bool, fused: bool) -> Callable[..., Tensor]:
        def add(output_and_bias: tuple[Tensor, Tensor | None], *others: Any) -> Tensor:
            _drop_before(norm, output_and_bias[0])
            return sums(training, fused)(output_and_bias, *others)

        return add

    return sum_of
