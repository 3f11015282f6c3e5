"""One matrix product for each group of consecutive rows: y[i] = x[i] W[g(i)]^T. The linears of experts, all at once."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from mindspeed_llm.ops.registry import REFERENCE, implementation, register


class FrozenWeights(Protocol):
    """Weights [g, n, k] without gradients that are kept in another form, for instance quantised."""

    shape: torch.Size

    def expert(self, index: int) -> Tensor:
        """The matrix [n, k] of one group; made anew by every call."""


def grouped_matmul(x: Tensor, weight: Tensor | FrozenWeights, group_sizes: Tensor) -> Tensor:
    """Rows [t, k], grouped by weight, times weights [g, n, k] transposed -> [t, n].

    Args:
        weight: weights kept in another form are made one at a time, forward and again backward.
        group_sizes: [g] whole numbers on the CPU, summing to t; groups may be empty.
    """
    if not isinstance(weight, Tensor):
        return _FrozenByGroup.apply(x, weight, group_sizes.tolist())
    return implementation("grouped_matmul")(x, weight, group_sizes)


class _ByGroup(torch.autograd.Function):
    """A product per group into one output; gradients of the weights are written where they belong, without adding."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, sizes: list[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sizes = sizes
        out = x.new_empty(x.shape[0], weight.shape[1])
        for rows, matrix, result in zip(x.split(sizes), weight, out.split(sizes)):
            torch.mm(rows, matrix.t(), out=result)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        start = 0
        for index, size in enumerate(ctx.sizes):
            rows = slice(start, start + size)
            if grad_x is not None:
                torch.mm(grad[rows], weight[index], out=grad_x[rows])
            if grad_weight is not None:
                torch.mm(grad[rows].t(), x[rows], out=grad_weight[index])
            start += size
        return grad_x, grad_weight, None


class _FrozenByGroup(torch.autograd.Function):
    """A product per group, whose matrix exists for that long."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: FrozenWeights, sizes: list[int]) -> Tensor:
        ctx.weight, ctx.sizes = weight, sizes
        out = x.new_empty(x.shape[0], weight.shape[1])
        for index, (rows, result) in enumerate(zip(x.split(sizes), out.split(sizes))):
            if len(rows):
                torch.mm(rows, weight.expert(index).t(), out=result)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        grad = grad.contiguous()
        out = grad.new_empty(grad.shape[0], ctx.weight.shape[2])
        for index, (rows, result) in enumerate(zip(grad.split(ctx.sizes), out.split(ctx.sizes))):
            if len(rows):
                torch.mm(rows, ctx.weight.expert(index), out=result)
        return out, None, None


@register("grouped_matmul", "torch")
def by_group(x: Tensor, weight: Tensor, group_sizes: Tensor) -> Tensor:
    """A torch.mm for each group."""
    return _ByGroup.apply(x, weight, group_sizes.tolist())


def why_no_grouped_mm() -> str | None:
    """Why torch's grouped kernel cannot be called; None when it can."""
    return None if hasattr(torch, "_grouped_mm") else f"torch {torch.__version__} has no _grouped_mm"


@register("grouped_matmul", "grouped_mm", devices=("cuda", "cpu"), priority=1, unless=why_no_grouped_mm)
def grouped_mm(x: Tensor, weight: Tensor, group_sizes: Tensor) -> Tensor:
    """torch's grouped kernel, which takes bfloat16 with rows of a multiple of 16 bytes; anything else goes by group."""
    aligned = x.shape[1] % 8 == 0 and weight.shape[1] % 8 == 0
    if x.dtype != torch.bfloat16 or not aligned or x.shape[0] == 0:
        return by_group(x, weight, group_sizes)
    ends = group_sizes.to(device=x.device, dtype=torch.int32, non_blocking=True).cumsum(0, dtype=torch.int32)
    return _ContiguousGradient.apply(torch._grouped_mm(x.contiguous(), weight.transpose(1, 2), offs=ends))


class _ContiguousGradient(torch.autograd.Function):
    """The identity; the kernel's backward pass refuses gradients that are expanded or transposed."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad.contiguous()


@register("grouped_matmul", REFERENCE, priority=-1)
def reference(x: Tensor, weight: Tensor, group_sizes: Tensor) -> Tensor:
    """The formula, differentiated by autograd: every row with its own matrix."""
    of_row = torch.repeat_interleave(torch.arange(weight.shape[0], device=x.device), group_sizes.to(x.device))
    return torch.einsum("tk,tnk->tn", x, weight[of_row])
