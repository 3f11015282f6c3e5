"""megatron-core's parallel linears with communication in chunks and weight gradients added inside the product.

The forms are those of megatron-core (t ranks, SP sequence parallelism):

    column   y = AG(x) W^T            dx = RS(dy W) with SP, all-reduce(dy W) without     dW = dy^T AG(x)
    row      y = RS(x W^T) with SP    dx = AG(dy) W                                       dW = AG(dy)^T x

A linear takes megatron-core's own path unless one of the two is asked for, or its weight is held in NF4: such a weight
is made dense for each product, once forward and once backward, and has no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch import Tensor, nn

from mindspeed_llm.models.nf4_weight import Nf4Weight
from mindspeed_llm.ops.matmul_accumulate import matmul_accumulate
from mindspeed_llm.ops.parallel_matmul import all_gather_matmul, matmul_reduce_scatter, product


@dataclass(frozen=True)
class Product:
    """How a linear is computed.

    Args:
        group: tensor-parallel group.
        gathers: the input is this rank's share of the sequence (column form under SP).
        scatters: the output is (row form under SP).
        reduces: the gradient of the input is summed over the group (column form without SP).
        chunks: of the sequence, see ops.parallel_matmul.
        accumulates: the weight's gradient is added to its `main_grad`.
    """

    group: Any
    gathers: bool = False
    scatters: bool = False
    reduces: bool = False
    chunks: int = 1
    accumulates: bool = False


class _Linear(torch.autograd.Function):
    """y = x W^T + bias in one of the forms; what SP gathers is gathered again for the weight's gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | Nf4Weight, bias: Tensor | None, how: Product) -> Tensor:
        ctx.how, ctx.parameter, ctx.has_bias = how, weight, bias is not None
        if isinstance(weight, Nf4Weight):
            weight = weight.materialize()
        else:
            ctx.save_for_backward(x, weight)
        if how.gathers:
            y, _ = all_gather_matmul(x, weight, how.group, how.chunks)
        elif how.scatters:
            y = matmul_reduce_scatter(x, weight, how.group, how.chunks)
        else:
            y = product(x, weight)
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        if isinstance(ctx.parameter, Nf4Weight):
            weight = ctx.parameter.materialize()
        else:
            x, weight = ctx.saved_tensors
        how, wants_weight = ctx.how, ctx.needs_input_grad[1]
        work = None
        if how.gathers and wants_weight:
            whole = x.new_empty(grad.shape[0], *x.shape[1:])
            work = dist.all_gather_into_tensor(whole, x.contiguous(), group=how.group, async_op=True)
        if how.gathers:
            grad_x = matmul_reduce_scatter(grad, weight.t(), how.group, how.chunks)
        elif how.scatters:
            grad_x, grad = all_gather_matmul(grad, weight.t(), how.group, how.chunks)
        else:
            grad_x = product(grad, weight.t())
        if work is not None:
            work.wait()
            x = whole
        if how.reduces:
            work = dist.all_reduce(grad_x, group=how.group, async_op=True)
        grad_weight = _weight_gradient(ctx.parameter, grad, x, how.accumulates) if wants_weight else None
        grad_bias = grad.flatten(0, -2).sum(0) if ctx.has_bias else None
        if how.reduces:
            work.wait()
        return grad_x, grad_weight, grad_bias, None


def _weight_gradient(parameter: Tensor, grad: Tensor, x: Tensor, accumulates: bool) -> Tensor:
    """The gradient; where it is added to main_grad, a tensor of undefined content in its place.

    megatron's DistributedDataParallel starts its reductions when a gradient arrives, and looks at the mark whether it
    has been counted.
    """
    if not (accumulates and hasattr(parameter, "main_grad")):
        return grad.flatten(0, -2).t() @ x.flatten(0, -2)
    matmul_accumulate(parameter.main_grad, grad, x)
    parameter.grad_added_to_main_grad = True
    return torch.empty_like(parameter)


def linear(x: Tensor, weight: Tensor | Nf4Weight) -> Tensor:
    """x W^T, [..., in] -> [..., out], with a weight that no rank shares."""
    if isinstance(weight, Nf4Weight):
        return _Linear.apply(x, weight, None, Product(None))
    return F.linear(x, weight)


def _hold_in_nf4(module: nn.Module) -> None:
    """Put an empty weight in NF4 in the place of the dense one, which nothing has touched yet."""
    if module.config.quantized_linears:
        dense = module.weight
        del module.weight
        module.weight = Nf4Weight.like(dense)


def _is_plain(linear: nn.Module) -> bool:
    """Whether megatron-core's own path gives all that is asked for."""
    if isinstance(linear.weight, Nf4Weight):
        return False
    config = linear.config
    chunked = config.communication_chunks is not None and linear.sequence_parallel and linear.tp_group.size() > 1
    return not chunked and not (config.accumulate_weight_gradients and linear.weight.requires_grad)


class ColumnParallelLinear(tensor_parallel.ColumnParallelLinear):
    """megatron-core's, see the top of the file."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        _hold_in_nf4(self)

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[s, b, in] (a rank's share of s under SP) -> [s, b, out of this rank], and the bias if the caller adds it."""
        if weight is not None or self.gather_output or runtime_gather_output or _is_plain(self):
            return super().forward(input_, weight, runtime_gather_output)
        several = self.tp_group.size() > 1
        how = Product(
            self.tp_group,
            gathers=several and self.sequence_parallel,
            reduces=several and not self.sequence_parallel,
            chunks=self.config.communication_chunks or 1,
            accumulates=self.config.accumulate_weight_gradients,
        )
        bias = None if self.skip_bias_add else self.bias
        return _Linear.apply(input_, self.weight, bias, how), self.bias if self.skip_bias_add else None


class RowParallelLinear(tensor_parallel.RowParallelLinear):
    """megatron-core's, see the top of the file; its input is already cut along the channels."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        _hold_in_nf4(self)

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[s, b, in of this rank] -> [s, b, out] (a rank's share of s under SP), and the bias if the caller adds it."""
        if not self.input_is_parallel or _is_plain(self):
            return super().forward(input_)
        several = self.tp_group.size() > 1
        scatters = several and self.sequence_parallel
        how = Product(
            self.tp_group,
            scatters=scatters,
            chunks=self.config.communication_chunks or 1,
            accumulates=self.config.accumulate_weight_gradients,
        )
        out = _Linear.apply(input_, self.weight, None, how)
        if several and not scatters:
            out = reduce_from_tensor_model_parallel_region(out, group=self.tp_group)
        if self.skip_bias_add:
            return out, self.bias
        return out if self.bias is None else out + self.bias, None
