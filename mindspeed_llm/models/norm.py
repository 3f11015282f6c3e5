"""The normalisation layers of a model: one weight (and bias), computed by ops.norm."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from mindspeed_llm import accelerator
from mindspeed_llm.models.recompute import keep, without_output
from mindspeed_llm.ops.norm import add_rms_norm, layer_norm, rms_norm


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
    With layernorm_zero_centered_gamma the weight is kept as its difference from 1.

    Attributes:
        recomputed: whether the output may be dropped: by `drop(later)`, see `models.recompute.without_output`.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.offset = 1.0 if config.layernorm_zero_centered_gamma else 0.0
        self.weight = new_parameter((hidden_size,), config)
        nn.init.constant_(self.weight, 1.0 - self.offset)
        self._made: tuple[Tensor, Tensor] | None = None
        self.recomputed, self.drop = False, keep

    def forward(self, x: Tensor) -> Tensor:
        made, self._made = self._made, None
        if made is not None and made[0] is x:
            return made[1]
        if self.recomputed:
            out, self.drop = without_output(self._normed, x)
            return out
        return self._normed(x)

    def _normed(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, self.offset)

    def of_sum(self, x: Tensor, residual: Tensor) -> Tensor:
        """x + residual, normalised in the same pass; the next call on that very tensor returns what was made here."""
        if self.recomputed:
            # The sum stays. Its gradient is rounded once only in this very operator: the norm alone would round twice.
            (normed, total), self.drop = without_output(self._normed_sum, x, residual, dropped=1)
        else:
            normed, total = self._normed_sum(x, residual)
        self._made = total, normed
        return total

    def _normed_sum(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return add_rms_norm(x, residual, self.weight, self.eps, self.offset)


class LayerNorm(nn.Module):
    """x [..., hidden_size] -> (x - mean) / std * weight + bias; `recomputed` and `drop` as those of `RMSNorm`."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.offset = 1.0 if config.layernorm_zero_centered_gamma else 0.0
        self.weight = new_parameter((hidden_size,), config)
        self.bias = new_parameter((hidden_size,), config)
        nn.init.constant_(self.weight, 1.0 - self.offset)
        nn.init.zeros_(self.bias)
        self.recomputed, self.drop = False, keep

    def forward(self, x: Tensor) -> Tensor:
        if self.recomputed:
            out, self.drop = without_output(self._normed, x)
            return out
        return self._normed(x)

    def _normed(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps, self.offset)
