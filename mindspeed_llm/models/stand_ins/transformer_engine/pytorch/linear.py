"""Transformer Engine's Linear and LayerNormLinear: a matrix cut among tensor-parallel ranks, by rows or by columns."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mindspeed_llm.models.stand_ins.transformer_engine.pytorch.module.base import (
    DeferredGradients,
    TransformerEngineBaseModule,
    device_of,
)
from mindspeed_llm.models.stand_ins.transformer_engine.pytorch.norm import norm_parameter, normalize


def multiply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    fuse_wgrad_accumulation: bool,
    deferred: DeferredGradients | None = None,
    **parallel: Any,
) -> Tensor:
    """x [..., in] weight [out, in]^T + bias through megatron's own function, which gathers, reduces and accumulates.

    Args:
        deferred: keeps what the weight's gradient is made of, which is then not computed in the backward pass.
    """
    from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce

    options = {"allreduce_dgrad": False, "sequence_parallel": False, "tp_group": None, **parallel}
    if torch.is_autocast_enabled():
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = (None if t is None else t.to(dtype) for t in (x, weight, bias))
    if deferred is not None:
        return deferred.multiply(x, weight, bias, options)
    return linear_with_grad_accumulation_and_async_allreduce(
        x, weight, bias, gradient_accumulation_fusion=fuse_wgrad_accumulation, **options
    )


def weight_init(module: nn.Module, init_method: Callable[[Tensor], Any] | None) -> Callable[[Tensor], None]:
    """Draws a weight from the stream that differs between the ranks it is cut among, where there is one."""
    method = init_method or (lambda weight: nn.init.normal_(weight, mean=0.0, std=0.023))
    tracker, name = module.get_rng_state_tracker, module.rng_tracker_name

    def init_fn(weight: Tensor) -> None:
        stream = contextlib.nullcontext() if tracker is None else tracker().fork(*([name] if name else []))
        with stream:
            method(weight)

    return init_fn


def mark_cut(parameter: Tensor, dimension: int) -> None:
    """Tell megatron that ranks hold slices of a parameter along `dimension`."""
    parameter.tensor_model_parallel = True
    parameter.partition_dim = dimension
    parameter.partition_stride = 1


class _ParallelLinear(TransformerEngineBaseModule):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable[[Tensor], Any] | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: Any = "cuda",
        delay_wgrad_compute: bool = False,
        **overlap: Any,
    ):
        super().__init__()
        self.refuse_overlap(overlap)
        if parallel_mode not in (None, "column", "row"):
            raise ValueError(f"parallel_mode {parallel_mode!r} is wrong; legal: column, row, None")
        self.tp_group, self.ub_name = tp_group, overlap.get("ub_name")
        self.tp_size = tp_size if tp_group is None else tp_group.size()
        self.get_rng_state_tracker, self.rng_tracker_name = get_rng_state_tracker, rng_tracker_name
        self.parallel_mode, self.use_bias, self.return_bias = parallel_mode, bias, return_bias
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        self.save_original_input = False
        self.in_features = in_features // (self.tp_size if parallel_mode == "row" else 1)
        self.out_features = out_features // (self.tp_size if parallel_mode == "column" else 1)
        dtype = params_dtype or torch.get_default_dtype()
        where = {"dtype": dtype, "device": device_of(device)}
        weight = nn.Parameter(torch.empty(self.out_features, self.in_features, **where))
        self.draw("weight", weight, weight_init(self, init_method))
        if bias:
            self.draw("bias", nn.Parameter(torch.empty(self.out_features, **where)), nn.init.zeros_)
        else:
            self.bias = torch.empty(0, **where)  # what Transformer Engine has there; megatron asks for its size
        self.mark_parameters()
        if delay_wgrad_compute:
            self.defer_gradients({"weight": self.weight, **({"bias": self.bias} if bias else {})})

    def mark_parameters(self) -> None:
        if self.parallel_mode is not None:
            mark_cut(self.weight, 0 if self.parallel_mode == "column" else 1)
        if self.use_bias and self.parallel_mode == "column":
            mark_cut(self.bias, 0)
        if self.use_bias and self.parallel_mode == "row":
            self.bias.sequence_parallel = self.sequence_parallel

    def project(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The product of this rank's part and what ranks must exchange for it."""
        from megatron.core.tensor_parallel import mappings

        bias = self.bias if self.use_bias and not self.return_bias else None
        parallel: dict[str, Any] = {}
        if self.parallel_mode == "column" and self.tp_size > 1:
            parallel = {
                "allreduce_dgrad": not self.sequence_parallel,
                "sequence_parallel": self.sequence_parallel,
                "tp_group": self.tp_group,
            }
        reduced = self.parallel_mode == "row" and self.tp_size > 1
        out = multiply(
            x, self.weight, None if reduced else bias, self.fuse_wgrad_accumulation, self.deferred, **parallel
        )
        if reduced:
            if self.sequence_parallel:
                out = mappings.reduce_scatter_to_sequence_parallel_region(out, group=self.tp_group)
            else:
                out = mappings.reduce_from_tensor_model_parallel_region(out, group=self.tp_group)
            out = out if bias is None else out + bias
        return (out, self.bias) if self.return_bias else out


class Linear(_ParallelLinear):
    """x [..., in] -> [..., out] of this rank; with return_bias the bias comes beside the product, not added."""

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """`is_first_microbatch` tells Transformer Engine to keep 8-bit weights; there are none."""
        return self.project(x)


class LayerNormLinear(_ParallelLinear):
    """A norm and a Linear that takes its output."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        normalization: str = "LayerNorm",
        zero_centered_gamma: bool = False,
        return_layernorm_output: bool = False,
        sequence_parallel: bool = False,
        params_dtype: torch.dtype | None = None,
        device: Any = "cuda",
        **options: Any,
    ):
        super().__init__(
            in_features,
            out_features,
            sequence_parallel=sequence_parallel,
            params_dtype=params_dtype,
            device=device,
            **options,
        )
        self.eps, self.normalization, self.zero_centered_gamma = eps, normalization, zero_centered_gamma
        self.return_layernorm_output = return_layernorm_output
        one = functools.partial(nn.init.constant_, val=0.0 if zero_centered_gamma else 1.0)
        self.draw("layer_norm_weight", norm_parameter(in_features, params_dtype, device), one)
        if normalization == "LayerNorm":
            self.draw("layer_norm_bias", norm_parameter(in_features, params_dtype, device), nn.init.zeros_)
        else:
            self.layer_norm_bias = None
        self.mark_parameters()

    def mark_parameters(self) -> None:
        super().mark_parameters()
        for name in ("layer_norm_weight", "layer_norm_bias"):
            if getattr(self, name, None) is not None:
                getattr(self, name).sequence_parallel = self.sequence_parallel

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
        """As `Linear`; with return_layernorm_output the norm's output comes last."""
        normed = normalize(
            self.normalization, x, self.layer_norm_weight, self.layer_norm_bias, self.eps, self.zero_centered_gamma
        )
        out = self.project(normed)
        if not self.return_layernorm_output:
            return out
        return (*out, normed) if isinstance(out, tuple) else (out, normed)
