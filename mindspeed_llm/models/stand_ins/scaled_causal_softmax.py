"""Megatron's extension `scaled_upper_triang_masked_softmax_cuda`: softmax(scale x) over a position and those before."""

from __future__ import annotations

import torch
from torch import Tensor

from mindspeed_llm.models.stand_ins.softmax import softmax_backward


def forward(x: Tensor, scale: Tensor) -> Tensor:
    """[b n, s, s] -> causal softmax(scale x)."""
    later = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
    return torch.softmax((x.float() * scale.item()).masked_fill(later, float("-inf")), dim=-1).to(x.dtype)


backward = softmax_backward
