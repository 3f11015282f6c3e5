"""A frozen linear and its adapter as one autograd function.

With W frozen, s = alpha / r, t-way tensor parallelism and sequence parallelism (SP), as sums over ranks:

    column   y = AG(x) W^T + s AG(x A^T) B^T      W, B cut by rows, A replicated
    row      y = RS(x W^T) + s RS(x A^T) B^T      W, A cut by columns, B replicated

AG / RS are all-gather / reduce-scatter along the sequence; without SP the column form has no forward collective and
the row form all-reduces. Only r-wide tensors move for the adapter, and the gathered output gradient of a row linear
serves both branches. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021), section 4.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_llm.ops.parallel_matmul import all_gather_matmul, matmul_reduce_scatter


class FrozenWeight(Protocol):
    """A frozen weight that is kept in another form than the matrix it stands for, for instance quantised."""

    def materialize(self) -> Tensor:
        """This rank's matrix [out, in] in the type of the computation; made anew by every call."""


def dense(weight: Tensor | FrozenWeight) -> Tensor:
    """The matrix itself."""
    return weight if isinstance(weight, Tensor) else weight.materialize()


@dataclass(frozen=True)
class LinearKind:
    """Which of the four forms a linear has.

    Attributes:
        column: cut by rows of W (ColumnParallelLinear); otherwise by columns.
        group: tensor-parallel group.
        world: its size.
        chunks: of the sequence, in which what is sent and what is multiplied overlap under SP (ops.parallel_matmul).
    """

    column: bool
    sequence_parallel: bool
    group: Any
    world: int
    scaling: float
    chunks: int = 1


def all_gather(x: Tensor, kind: LinearKind) -> Tensor:
    """[s/t, ...] -> [s, ...]."""
    out = x.new_empty((x.shape[0] * kind.world, *x.shape[1:]))
    dist.all_gather_into_tensor(out, x.contiguous(), group=kind.group)
    return out


def reduce_scatter(x: Tensor, kind: LinearKind) -> Tensor:
    """Partial sums [s, ...] -> this rank's rows [s/t, ...] of the sum."""
    out = x.new_empty((x.shape[0] // kind.world, *x.shape[1:]))
    dist.reduce_scatter_tensor(out, x.contiguous(), group=kind.group)
    return out


def all_reduce(x: Tensor, kind: LinearKind) -> Tensor:
    """Sum over the group, in place."""
    dist.all_reduce(x, group=kind.group)
    return x


def add_product(out: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """out += scale * a b over the last dimension, in place: [..., n] += [..., k] [k, n]."""
    out.view(-1, out.shape[-1]).addmm_(a.reshape(-1, a.shape[-1]), b, alpha=scale)
    return out


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias: [..., k] and [n, k] -> [..., n].

    As one product of matrices: torch.matmul makes a batch of one product per row, each with a copy of W, where x needs
    no gradient and has unusual strides.
    """
    return torch.nn.functional.linear(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])


def outer_sum(a: Tensor, b: Tensor) -> Tensor:
    """a^T b summed over all rows: [..., m], [..., n] -> [m, n]."""
    return a.reshape(-1, a.shape[-1]).t() @ b.reshape(-1, b.shape[-1])


class FrozenLinearWithAdapter(torch.autograd.Function):
    """y = linear(x) + s adapter(dropped), with gradients for x, `dropped`, A and B only.

    Shapes: x [s, b, in], W [out, in], bias [out] or None, A [R, in], B [out, R]; all local to this rank. `dropped` is
    x after dropout, or None when there is none. W may be a `FrozenWeight`: then that object waits for the backward
    pass, and the matrix lives no longer than the product that needs it.
    """

    @staticmethod
    def forward(ctx, x, dropped, weight, bias, lora_a, lora_b, kind: LinearKind):
        """The output [s', b, out], s' being this rank's rows of a row linear under SP and all rows otherwise."""
        parallel, frozen, weight = kind.world > 1, weight, dense(weight)
        source = x if dropped is None else dropped
        narrow = product(source, lora_a)
        cut = parallel and kind.sequence_parallel
        if kind.column and cut:
            y, _ = all_gather_matmul(x, weight, kind.group, kind.chunks)
            y = y if bias is None else y.add_(bias)
            narrow = all_gather(narrow, kind)
        elif kind.column:
            y = product(x, weight, bias)
        elif cut:
            y = matmul_reduce_scatter(x, weight, kind.group, kind.chunks)
            narrow = reduce_scatter(narrow, kind)
        else:
            y = product(x, weight)
            if parallel:
                y, narrow = all_reduce(y, kind), all_reduce(narrow, kind)
        add_product(y, narrow, lora_b.t(), kind.scaling)
        ctx.kind, ctx.has_dropout = kind, dropped is not None
        # A tensor goes the way of saved tensors, so that hooks on them see it; an object is held as it is.
        ctx.frozen = None if isinstance(frozen, Tensor) else frozen
        ctx.save_for_backward(source, narrow, weight if ctx.frozen is None else None, lora_a, lora_b)
        return y

    @staticmethod
    def backward(ctx, dy):
        """Gradients of x, dropped, A, B; those of replicated factors under SP are this rank's share of the sum."""
        kind, (source, narrow, weight, lora_a, lora_b) = ctx.kind, ctx.saved_tensors
        parallel = kind.world > 1
        wants_x, wants_dropped = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        if wants_x:
            weight = dense(weight if ctx.frozen is None else ctx.frozen)
        grad_b = outer_sum(dy, narrow) * kind.scaling
        cut = parallel and kind.sequence_parallel
        grad_x = grad_dropped = None
        if not kind.column and cut and wants_x:
            grad_x, dy = all_gather_matmul(dy, weight.t(), kind.group, kind.chunks)
        elif not kind.column and cut:
            dy = all_gather(dy, kind)
        grad_narrow = product(dy, lora_b.t()) * kind.scaling
        if kind.column and parallel:
            reduce = reduce_scatter if kind.sequence_parallel else all_reduce
            grad_narrow = reduce(grad_narrow, kind)
        grad_a = outer_sum(grad_narrow, source)
        if wants_x and kind.column and cut:
            grad_x = matmul_reduce_scatter(dy, weight.t(), kind.group, kind.chunks)
        elif wants_x and grad_x is None:
            grad_x = product(dy, weight.t())
            if kind.column and parallel:
                grad_x = all_reduce(grad_x, kind)
        if wants_x and not ctx.has_dropout:
            add_product(grad_x, grad_narrow, lora_a)
        if wants_dropped:
            grad_dropped = product(grad_narrow, lora_a.t())
        return grad_x, grad_dropped, None, None, grad_a, grad_b, None
