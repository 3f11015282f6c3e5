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
from torch import Tensor

from mindspeed_llm.accelerator.ranges import named
from mindspeed_llm.lora.fusion import products
from mindspeed_llm.lora.fusion.cost import Pass, Rates, Schedule, choose
from mindspeed_llm.lora.prepacked import PrepackedWeight
from mindspeed_llm.ops.adapter import (
    CounterMask,
    adapted_product,
    adapter_down,
    adapter_down_gradient,
    adapter_up,
    outer_sum,
    plain_adapters,
    product,
)


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
        prepack: lay frozen weights out for their products (`--lora-prepack`).
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
    prepack: bool = False

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
    x after dropout, or the mask by which the products that read x drop it, or None when there is no dropout. W may be a
    `FrozenWeight`: then that object waits for the backward pass, and the matrix lives no longer than the product that
    needs it.
    """

    @staticmethod
    def forward(ctx, x, dropped, weight, bias, lora_a, lora_b, kind: LinearKind):
        """The output [s', b, out], s' being this rank's rows of a row linear under SP and all rows otherwise."""
        mask = dropped if isinstance(dropped, CounterMask) else None
        source = dropped if isinstance(dropped, Tensor) else x
        with named("lora: adapter down"):
            narrow = adapter_down(source, lora_a, mask)
        matrix = base_matrix(weight, lora_a, lora_b, kind)
        if kind.form(False) is None and not kind.combine:
            y = adapted_product(x, matrix, bias, narrow, lora_b, kind.scaling)
        else:
            y, narrow = multiply_and_send(x, narrow, matrix, bias, kind, backward=False)
            if not kind.combine:
                with named("lora: adapter up"):
                    adapter_up(y, narrow, lora_b, kind.scaling)
        ctx.kind, ctx.mask, ctx.has_dropped = kind, mask, source is dropped
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
        adds_here = wants_x and not ctx.has_dropped and not kind.combine
        if adds_here and kind.form(True) is None:
            grad_x = adapted_product(dy, matrix, None, grad_narrow, lora_a.t(), 1.0, ctx.mask)
            adds_here = False
        else:
            grad_x, grad_narrow = multiply_and_send(dy, grad_narrow, matrix, None, kind, backward=True)
        grad_dropped = None
        with named("lora: adapter backward"):
            grad_a = adapter_down_gradient(grad_narrow, source, ctx.mask)
            if adds_here:
                adapter_up(grad_x, grad_narrow, lora_a.t(), 1.0, ctx.mask)
            if wants_dropped:
                grad_dropped = product(grad_narrow, lora_a.t())
        return grad_x, grad_dropped, None, None, grad_a, grad_b, None


def adapted_linear(
    x: Tensor,
    dropped: Tensor | CounterMask | None,
    weight: Tensor | FrozenWeight,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    kind: LinearKind,
    prepacked: PrepackedWeight | None = None,
) -> Tensor:
    """`FrozenLinearWithAdapter`; where nothing is sent and torch multiplies a tensor, the same by torch's functions.

    Those have less to do per call, which small layers feel; the scaling is folded into the product that adds. There
    the weight may also be `prepacked`.
    """
    if kind.world > 1 or kind.combine or not isinstance(weight, Tensor) or not plain_adapters():
        return FrozenLinearWithAdapter.apply(x, dropped, weight, bias, lora_a, lora_b, kind)
    rows = x.reshape(-1, x.shape[-1])
    source = rows if dropped is None else dropped.reshape(rows.shape)
    with named("lora: base product"):
        plain = prepacked is None
        y = torch.nn.functional.linear(rows, weight, bias) if plain else prepacked.product(rows, bias)
    with named("lora: adapter down and up"):
        y.addmm_(torch.nn.functional.linear(source, lora_a), lora_b.t(), alpha=kind.scaling)
    return y.view(*x.shape[:-1], weight.shape[0])
