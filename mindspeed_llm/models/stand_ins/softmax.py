"""What megatron's three softmax extensions share; each is the operator of ops.softmax, forward and backward apart."""

from __future__ import annotations

from torch import Tensor

from mindspeed_llm.ops import softmax


def softmax_backward(grad: Tensor, result: Tensor, scale: Tensor) -> Tensor:
    """Gradient of scores x for result = softmax(scale x), of the dtype of the result."""
    return softmax.softmax_backward(grad, result, scale.item())


def get_batch_per_block(sq: int, sk: int, b: int, n: int) -> int:
    """Rows a CUDA block of megatron's kernels takes; megatron asks whether it divides the work, which 1 does."""
    return 1
