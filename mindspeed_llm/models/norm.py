"""The normalisation layers of a model: one weight (and bias), computed by ops.norm."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from mindspeed_llm import accelerator
from mindspeed_llm.ops.norm import layer_norm, rms_norm


def new_parameter(size: tuple[int, ...], config: TransformerConfig) -> nn.Parameter:
    """An undefined parameter that every tensor-parallel rank holds as a whole."""
    device = "cpu" if config.use_cpu_initialization else accelerator.current().current_device()
    parameter = nn.Parameter(torch.empty(size, dtype=config.params_dtype, device=device))
    # Megatron sums the gradient of such a parameter over the tensor-parallel ranks, each of which saw part of the rows.
    parameter.sequence_parallel = config.sequence_parallel
    return parameter


class RMSNorm(nn.Module):
    """x [..., hidden_size] -> x / rms(x) * weight.

    Also q_layernorm and k_layernorm, over each head's channels: there every tensor-parallel rank normalises its own
    heads, and megatron sums the weight's gradient over the ranks because the configuration says qk_layernorm.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = new_parameter((hidden_size,), config)
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.Module):
    """x [..., hidden_size] -> (x - mean) / std * weight + bias."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = new_parameter((hidden_size,), config)
        self.bias = new_parameter((hidden_size,), config)
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)
