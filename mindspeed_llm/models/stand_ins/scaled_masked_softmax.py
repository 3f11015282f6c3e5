"""Megatron's extension `scaled_masked_softmax_cuda`: softmax(scale x) where the mask is false."""

from __future__ import annotations

from torch import Tensor

from mindspeed_llm.models.stand_ins.softmax import get_batch_per_block, softmax_backward
from mindspeed_llm.ops.softmax import scaled_masked_softmax

__all__ = ["backward", "forward", "get_batch_per_block"]


def forward(x: Tensor, mask: Tensor, scale: Tensor) -> Tensor:
    """[b, n, s, s_k] and a mask that broadcasts to it, true where hidden; rows that see nothing become zero."""
    return scaled_masked_softmax(x, mask, scale.item())


backward = softmax_backward
