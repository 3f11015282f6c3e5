"""Transformer Engine's LayerNorm and RMSNorm over our operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mindspeed_llm import accelerator
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


def norm_parameter(size: int, dtype: torch.dtype | None, device: Any) -> nn.Parameter:
    """A parameter [size] without values, which every rank holds whole."""
    return nn.Parameter(torch.empty(size, dtype=dtype or torch.get_default_dtype(), device=device_of(device)))


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
        self.weight = norm_parameter(size, dtype, device)
        self.bias = norm_parameter(size, dtype, device) if self.kind == "LayerNorm" else None
        self._set_parameters()

    def reset_parameters(self) -> None:
        """Ones (zeros where centred), and zeros for the bias; on the accelerator if they were on the meta device."""
        if self.weight.is_meta:
            self.to_empty(device=accelerator.current().current_device())
        self._set_parameters()

    def _set_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.0 if self.zero_centered_gamma else 1.0)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        for parameter in self.parameters():
            # megatron sums its gradient, because ranks see different rows
            parameter.sequence_parallel = self.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.weight.dtype)  # as Transformer Engine's, whatever the dtype of its input
        return normalize(self.kind, x, self.weight, self.bias, self.eps, self.zero_centered_gamma)


class LayerNorm(_Norm):
    """(x - mean) / std * weight + bias."""

    kind = "LayerNorm"


class RMSNorm(_Norm):
    """x / rms(x) * weight."""

    kind = "RMSNorm"
