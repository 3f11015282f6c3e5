"""Frozen weights of a CPU laid out as its matrix products read them: `--lora-prepack`.

oneDNN arranges the weight of every product anew before it multiplies. A frozen one can be arranged once: for y = x W^T,
and once more for dx = dy W. Both lie beside the weight itself, which checkpoints, merging and DoRA read.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows of the products that weights are arranged for. A constant, so that numbers do not depend on the first batch.
ROWS = 2048


class PrepackedWeight:
    """A frozen bf16 weight [out, in] on a CPU in the orders of its two products: twice its bytes."""

    def __init__(self, weight: Tensor):
        self._state = _state(weight)
        weight = weight.detach()
        self.forward = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
        self.backward = torch.ops.mkldnn._reorder_linear_weight(weight.t().contiguous(), ROWS)

    def is_of(self, weight: Tensor) -> bool:
        """Whether the weight is still what was laid out: nothing has written to it since, or moved it."""
        return _state(weight) == self._state

    def product(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias: [m, in] -> [m, out]; only x gets a gradient."""
        return _Product.apply(rows, self, bias)


def _state(weight: Tensor) -> tuple[int, int]:
    return weight.data_ptr(), weight._version


def _multiply(rows: Tensor, prepacked: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, prepacked, bias, "none", [], "")


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, weight: PrepackedWeight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return _multiply(rows.contiguous(), weight.forward, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return _multiply(grad.contiguous(), ctx.weight.backward), None, None
