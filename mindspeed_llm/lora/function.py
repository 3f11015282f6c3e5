"""A frozen linear and its adapter as one autograd function.

With W frozen, s = alpha / r, t-way tensor parallelism and sequence parallelism (SP), as sums over ranks:

    column   y = AG(x) W^T + s AG(x A^T) B^T      W, B cut by rows, A replicated
    row      y = RS(x W^T) + s RS(x A^T) B^T      W, A cut by columns, B replicated

AG / RS are all-gather / reduce-scatter along the sequence; without SP the column form has no forward collective and
the row form all-reduces. The backward pass of each form is the other form's: dx = RS(dy W) + s RS(dy B) A for column,
dx = AG(dy) W + s AG(dy B) A for row. Only r-wide tensors move for the adapter; how they move, and beside which
products, is lora/fusion. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021), section 4.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_llm.accelerator.ranges import named
from mindspeed_llm.lora.fusion import products
from mindspeed_llm.lora.fusion.cost import Pass, Rates, Schedule, choose


class FrozenWeight(Protocol):
    """A frozen weight that is kept in another form than the matrix it stands for, for instance quantised."""

    def materialize(self) -> Tensor:
        """This rank's matrix [out, in] in the type of the computation; made anew by every call."""


def dense(weight: Tensor | FrozenWeight) -> Tensor:
    """The matrix itself."""
    return weight if isinstance(weight, Tensor) else weight.materialize()


@dataclass(frozen=True)
class LinearKind:
    """Which of the four forms a linear has, and how it is computed.

    Attributes:
        column: cut by rows of W (ColumnParallelLinear); otherwise by columns.
        group: tensor-parallel group.
        world: its size.
        chunks: of the sequence, in which what is sent and what is multiplied overlap; None where `rates` choose.
        rates: of this machine (lora.fusion.calibrate); without them and without chunks, one chunk.
        fused: base and adapter are one function; otherwise one after the other, each with its own collectives.
        combine: multiply by W + s B A, formed in the weight's type, instead of by each (`--lora-fusion-combine`).
    """

    column: bool
    sequence_parallel: bool
    group: Any
    world: int
    scaling: float
    chunks: int | None = None
    rates: Rates | None = None
    fused: bool = True
    combine: bool = False

    def form(self, backward: bool) -> str | None:
        """The collective of a pass (lora.fusion.cost.FORMS); None where nothing is sent for it."""
        if self.world == 1:
            return None
        if self.column == backward:
            return "scatter" if self.sequence_parallel else "reduce"
        return "gather" if self.sequence_parallel else None

    def schedule(self, size: Pass) -> Schedule:
        """Of a pass of this linear."""
        if self.chunks is not None:
            return Schedule(self.chunks)
        return Schedule() if self.rates is None else choose(size, self.rates)


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


def outer_sum(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """scale * a^T b summed over all rows: [..., m], [..., n] -> [m, n]."""
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    return torch.addmm(a.new_empty(()).expand(a.shape[1], b.shape[1]), a.t(), b, beta=0, alpha=scale)


def base_matrix(weight: Tensor | FrozenWeight, lora_a: Tensor, lora_b: Tensor, kind: LinearKind) -> Tensor:
    """W, or W + s B A in the type of W where they are combined."""
    matrix = dense(weight)
    return torch.addmm(matrix, lora_b, lora_a, alpha=kind.scaling) if kind.combine else matrix


# Form of a pass -> what multiplies and sends, and what only sends the adapter's narrow tensor.
PRODUCTS = {
    "gather": products.gathered_product,
    "scatter": products.scattered_product,
    "reduce": products.reduced_product,
}
NARROW = {"gather": products.gather_narrow, "scatter": products.scatter_narrow, "reduce": products.reduce_narrow}


def multiply_and_send(
    x: Tensor, narrow: Tensor, weight: Tensor | None, bias: Tensor | None, kind: LinearKind, *, backward: bool
) -> tuple[Tensor | None, Tensor]:
    """x W^T + bias (None without a weight) and the adapter's narrow tensor, each through the collective of the pass."""
    form = kind.form(backward)
    if form is None:
        with named("lora: base product"):
            return None if weight is None else product(x, weight, bias), narrow
    if weight is None:
        return None, NARROW[form](narrow, kind.group)
    rows = x.shape[:-1].numel() * (kind.world if form == "gather" else 1)
    size = Pass(form, rows, x.shape[-1], weight.shape[0], narrow.shape[-1], kind.world, x.element_size())
    y, narrow = PRODUCTS[form](x, narrow, weight, kind.group, kind.schedule(size))
    return y if bias is None else y.add_(bias), narrow


class FrozenLinearWithAdapter(torch.autograd.Function):
    """y = linear(x) + s adapter(dropped), with gradients for x, `dropped`, A and B only.

    Shapes: x [s, b, in], W [out, in], bias [out] or None, A [R, in], B [out, R]; all local to this rank. `dropped` is
    x after dropout, or None when there is none. W may be a `FrozenWeight`: then that object waits for the backward
    pass, and the matrix lives no longer than the product that needs it.
    """

    @staticmethod
    def forward(ctx, x, dropped, weight, bias, lora_a, lora_b, kind: LinearKind):
        """The output [s', b, out], s' being this rank's rows of a row linear under SP and all rows otherwise."""
        source = x if dropped is None else dropped
        with named("lora: adapter down"):
            narrow = product(source, lora_a)
        matrix = base_matrix(weight, lora_a, lora_b, kind)
        y, narrow = multiply_and_send(x, narrow, matrix, bias, kind, backward=False)
        if not kind.combine:
            with named("lora: adapter up"):
                add_product(y, narrow, lora_b.t(), kind.scaling)
        ctx.kind, ctx.has_dropout = kind, dropped is not None
        # A tensor goes the way of saved tensors, so that hooks on them see it; an object is held as it is.
        ctx.frozen = None if isinstance(weight, Tensor) else weight
        ctx.save_for_backward(source, narrow, weight if ctx.frozen is None else None, lora_a, lora_b)
        return y

    @staticmethod
    def backward(ctx, dy):
        """Gradients of x, dropped, A, B; those of replicated factors under SP are this rank's share of the sum."""
        kind, (source, narrow, weight, lora_a, lora_b) = ctx.kind, ctx.saved_tensors
        wants_x, wants_dropped = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        weight = weight if ctx.frozen is None else ctx.frozen
        matrix = base_matrix(weight, lora_a, lora_b, kind).t() if wants_x else None
        with named("lora: adapter backward"):
            grad_b = outer_sum(dy, narrow, kind.scaling)
            grad_narrow = product(dy, lora_b.t()).mul_(kind.scaling)
        grad_x, grad_narrow = multiply_and_send(dy, grad_narrow, matrix, None, kind, backward=True)
        grad_dropped = None
        with named("lora: adapter backward"):
            grad_a = outer_sum(grad_narrow, source)
            if wants_x and not ctx.has_dropout and not kind.combine:
                add_product(grad_x, grad_narrow, lora_a)
            if wants_dropped:
                grad_dropped = product(grad_narrow, lora_a.t())
        return grad_x, grad_dropped, None, None, grad_a, grad_b, None


def adapted_linear(
    x: Tensor,
    dropped: Tensor | None,
    weight: Tensor | FrozenWeight,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    kind: LinearKind,
) -> Tensor:
    """`FrozenLinearWithAdapter`; where nothing is sent and a tensor is multiplied, the same from torch's own functions.

    Those have less to do per call, which small layers feel; the scaling is folded into the product that adds.
    """
    if kind.world > 1 or kind.combine or not isinstance(weight, Tensor):
        return FrozenLinearWithAdapter.apply(x, dropped, weight, bias, lora_a, lora_b, kind)
    rows = x.reshape(-1, x.shape[-1])
    source = rows if dropped is None else dropped.reshape(rows.shape)
    with named("lora: base product"):
        y = torch.nn.functional.linear(rows, weight, bias)
    with named("lora: adapter down and up"):
        y.addmm_(torch.nn.functional.linear(source, lora_a), lora_b.t(), alpha=kind.scaling)
    return y.view(*x.shape[:-1], weight.shape[0])
