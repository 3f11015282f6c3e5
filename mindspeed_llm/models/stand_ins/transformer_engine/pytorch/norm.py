"""Transformer Engine's LayerNorm and RMSNorm over our operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mindspeed_llm.models.stand_ins.transformer_engine.pytorch.module.base import device_of
from mindspeed_llm.ops.norm import layer_norm, rms_norm


def normalize(
    kind: str, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, zero_centered_gamma: bool
) -> Tensor:
    """LayerNorm or RMSNorm of x [..., h]; with zero_centered_gamma the factor is 1 + weight."""
    offset = 1.0 if zero_centered_gamma else 0.0
    if kind == "RMSNorm":
        return rms_norm(x, weight, eps, offset)
    return layer_norm(x, weight, bias, eps, offset)


def norm_parameter(
    size: int, value: float, dtype: torch.dtype | None, device: Any, sequence_parallel: bool
) -> nn.Parameter:
    """A parameter every rank holds whole; megatron sums its gradient when ranks see different rows."""
    made = torch.full((size,), value, dtype=dtype or torch.get_default_dtype(), device=device_of(device))
    parameter = nn.Parameter(made)
    parameter.sequence_parallel = sequence_parallel
    return parameter


class _Norm(nn.Module):
    kind: str

    def __init__(
        self,
        hidden_size: int | None = None,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        device: Any = "cuda",
        normalized_shape: int | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        size = normalized_shape if hidden_size is None else hidden_size
        dtype = dtype or params_dtype
        self.eps, self.zero_centered_gamma, self.sequence_parallel = eps, zero_centered_gamma, sequence_parallel
        self.weight = norm_parameter(size, 0.0 if zero_centered_gamma else 1.0, dtype, device, sequence_parallel)
        self.bias = norm_parameter(size, 0.0, dtype, device, sequence_parallel) if self.kind == "LayerNorm" else None

    def reset_parameters(self) -> None:
        """Ones (zeros where centred), and zeros for the bias."""
        nn.init.constant_(self.weight, 0.0 if self.zero_centered_gamma else 1.0)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return normalize(self.kind, x, self.weight, self.bias, self.eps, self.zero_centered_gamma)


class LayerNorm(_Norm):
    """(x - mean) / std * weight + bias."""

    kind = "LayerNorm"


class RMSNorm(_Norm):
    """x / rms(x) * weight."""

    kind = "RMSNorm"
