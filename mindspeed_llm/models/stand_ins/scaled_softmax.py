"""Megatron's extension `scaled_softmax_cuda`: softmax(scale x) over the last dimension, statistics in fp32."""

from __future__ import annotations

from torch import Tensor

from mindspeed_llm.models.stand_ins.softmax import softmax_backward
from mindspeed_llm.ops.softmax import scaled_masked_softmax


def forward(x: Tensor, scale: Tensor) -> Tensor:
    """[b, n, s, s_k] -> softmax(scale x)."""
    return scaled_masked_softmax(x, None, scale.item())


backward = softmax_backward
