"""What megatron's three softmax extensions share."""

from __future__ import annotations

import torch
from torch import Tensor


def softmax_backward(grad: Tensor, result: Tensor, scale: Tensor) -> Tensor:
    """Gradient of scores x for result = softmax(scale x), of the dtype of the result."""
    wide = torch.ops.aten._softmax_backward_data(grad.float(), result.float(), -1, torch.float32)
    return (wide * scale.item()).to(result.dtype)


def get_batch_per_block(sq: int, sk: int, b: int, n: int) -> int:
    """Rows a CUDA block of megatron's kernels takes; megatron asks whether it divides the work, which 1 does."""
    return 1
