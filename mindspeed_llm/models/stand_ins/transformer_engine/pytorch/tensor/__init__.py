"""Quantised tensors. There are none; megatron asks whether a parameter is one."""

from __future__ import annotations

from torch import Tensor


class QuantizedTensor(Tensor):
    """The class of parameters in 8 bits."""
