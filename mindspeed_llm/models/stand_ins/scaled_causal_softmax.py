"""Megatron's extension `scaled_upper_triang_masked_softmax_cuda`: softmax(scale x) over a position and those before."""

from __future__ import annotations

from torch import Tensor

from mindspeed_llm.models.stand_ins.softmax import softmax_backward
from mindspeed_llm.ops.softmax import scaled_masked_softmax


def forward(x: Tensor, scale: Tensor) -> Tensor:
    """[b n, s, s] -> causal softmax(scale x)."""
    return scaled_masked_softmax(x, None, scale.item(), causal=True)


backward = softmax_backward
