"""Megatron's extension `scaled_softmax_cuda`: softmax(scale x) over the last dimension, statistics in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from mindspeed_llm.models.stand_ins.softmax import softmax_backward


def forward(x: Tensor, scale: Tensor) -> Tensor:
    """[b, n, s, s_k] -> softmax(scale x)."""
    return torch.softmax(x * scale.item(), dim=-1, dtype=torch.float32).to(x.dtype)


backward = softmax_backward
