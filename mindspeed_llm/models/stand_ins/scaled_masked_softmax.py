"""Megatron's extension `scaled_masked_softmax_cuda`: softmax(scale x) where the mask is false."""

from __future__ import annotations

import torch
from torch import Tensor

from mindspeed_llm.models.stand_ins.softmax import get_batch_per_block, softmax_backward

__all__ = ["backward", "forward", "get_batch_per_block"]

# What megatron's kernel puts in place of a hidden score.
HIDDEN = -10000.0


def forward(x: Tensor, mask: Tensor, scale: Tensor) -> Tensor:
    """[b, n, s, s_k] and a mask that broadcasts to it, true where hidden; rows that see nothing become zero."""
    scores = (x.float() * scale.item()).masked_fill(mask, HIDDEN)
    return torch.softmax(scores, dim=-1).masked_fill(mask.all(dim=-1, keepdim=True), 0.0).to(x.dtype)


backward = softmax_backward
