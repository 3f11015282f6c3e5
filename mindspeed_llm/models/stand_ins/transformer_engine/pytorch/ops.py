"""Transformer Engine's chain of small operations, which megatron builds a feed-forward block from."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mindspeed_llm.models.stand_ins.transformer_engine.pytorch import norm
from mindspeed_llm.models.stand_ins.transformer_engine.pytorch.linear import multiply
from mindspeed_llm.models.stand_ins.transformer_engine.refusal import refuse
from mindspeed_llm.ops.activation import Gate, gated_activation


class FusibleOperation(nn.Module):
    """One operation of a chain."""


class Sequential(nn.Sequential):
    """Operations one after the other."""


class _Activation(FusibleOperation):
    def __init__(self, cache_quantized_input: bool = False):
        super().__init__()
        if cache_quantized_input:
            raise refuse("cache_quantized_input=True", "False")

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _gelu(x: Tensor) -> Tensor:
    # Transformer Engine's kernels use the tanh form.
    return F.gelu(x, approximate="tanh")


class GELU(_Activation):
    """x Phi(x), by tanh."""

    function = staticmethod(_gelu)


class ReLU(_Activation):
    """max(x, 0)."""

    function = staticmethod(F.relu)


class SiLU(_Activation):
    """x sigmoid(x)."""

    function = staticmethod(F.silu)


class GEGLU(_Activation):
    """gelu(first half) times second half."""

    function = staticmethod(functools.partial(gated_activation, gate=Gate("gelu_tanh")))


class ReGLU(_Activation):
    """relu(first half) times second half."""

    function = staticmethod(functools.partial(gated_activation, gate=Gate("relu")))


class SwiGLU(_Activation):
    """silu(first half) times second half."""

    function = staticmethod(functools.partial(gated_activation, gate=Gate("silu")))


class LayerNorm(norm.LayerNorm, FusibleOperation):
    """See `norm.LayerNorm`; the size comes first."""


class RMSNorm(norm.RMSNorm, FusibleOperation):
    """See `norm.RMSNorm`; the size comes first."""


class BasicLinear(FusibleOperation):
    """x [..., in] weight^T, the weight set from outside."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
        tensor_parallel_mode: str | None = None,
        tensor_parallel_group: Any = None,
        sequence_parallel: bool = False,
        rng_state_tracker_function: Any = None,
        accumulate_into_main_grad: bool = False,
        userbuffers_options: dict[str, Any] | None = None,
    ):
        super().__init__()
        if userbuffers_options:
            raise refuse("userbuffers_options", "None")
        size = 1 if tensor_parallel_group is None else tensor_parallel_group.size()
        self.column, self.group = tensor_parallel_mode == "column" and size > 1, tensor_parallel_group
        self.sequence_parallel, self.accumulate = sequence_parallel, accumulate_into_main_grad
        shape = (out_features // (size if self.column else 1), in_features)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        parallel = {}
        if self.column:
            parallel = {
                "allreduce_dgrad": not self.sequence_parallel,
                "sequence_parallel": self.sequence_parallel,
                "tp_group": self.group,
            }
        return multiply(x, self.weight, None, self.accumulate, **parallel)


class Bias(FusibleOperation):
    """x + bias, the bias set from outside."""

    def __init__(self, size: int, *, device: Any = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.bias = nn.Parameter(torch.empty(size, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


class _Reduce(FusibleOperation):
    def __init__(self, group: Any):
        super().__init__()
        self.group = group


class AllReduce(_Reduce):
    """The sum over the ranks, on each."""

    def forward(self, x: Tensor) -> Tensor:
        from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region

        return reduce_from_tensor_model_parallel_region(x, group=self.group)


class ReduceScatter(_Reduce):
    """The sum over the ranks, a share of the rows on each."""

    def forward(self, x: Tensor) -> Tensor:
        from megatron.core.tensor_parallel.mappings import reduce_scatter_to_sequence_parallel_region

        return reduce_scatter_to_sequence_parallel_region(x, group=self.group)
