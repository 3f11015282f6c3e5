"""Transformer Engine's GroupedLinear: consecutive rows, each group with a matrix of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mindspeed_llm.models.stand_ins.transformer_engine.pytorch.linear import mark_cut, multiply, weight_init
from mindspeed_llm.models.stand_ins.transformer_engine.pytorch.module.base import (
    TransformerEngineBaseModule,
    device_of,
)


class GroupedLinear(TransformerEngineBaseModule):
    """x [t, in] in groups of m_splits rows -> [t, out]; parameters are called weight0, bias0, weight1 ...

    Tokens are exchanged among tensor-parallel ranks by megatron's dispatcher, not here.
    """

    def __init__(
        self,
        num_gemms: int,
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
        self.num_gemms, self.use_bias, self.return_bias = num_gemms, bias, return_bias
        self.parallel_mode, self.tp_group, self.tp_size = parallel_mode, tp_group, tp_size
        self.sequence_parallel = tp_size > 1 and sequence_parallel
        self.get_rng_state_tracker, self.rng_tracker_name = get_rng_state_tracker, rng_tracker_name
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        self.save_original_input = False
        self.in_features = in_features // (tp_size if parallel_mode == "row" else 1)
        self.out_features = out_features // (tp_size if parallel_mode == "column" else 1)
        where = {"dtype": params_dtype or torch.get_default_dtype(), "device": device_of(device)}
        for index in range(num_gemms):
            weight = nn.Parameter(torch.empty(self.out_features, self.in_features, **where))
            self.draw(f"weight{index}", weight, weight_init(self, init_method))
            if bias:
                self.draw(f"bias{index}", nn.Parameter(torch.empty(self.out_features, **where)), nn.init.zeros_)
            else:
                setattr(self, f"bias{index}", torch.empty(0, **where))
        self.mark_parameters()
        if delay_wgrad_compute:
            self.defer_gradients(dict(self.named_parameters()))

    def mark_parameters(self) -> None:
        if self.parallel_mode is not None:
            for index in range(self.num_gemms):
                mark_cut(getattr(self, f"weight{index}"), 0 if self.parallel_mode == "column" else 1)

    def forward(self, x: Tensor, m_splits: Sequence[int], is_first_microbatch: bool | None = None) -> Any:
        """Rows of the groups one after the other; with return_bias the biases of all groups come beside them."""
        biases = [getattr(self, f"bias{index}") for index in range(self.num_gemms)]
        added = biases if self.use_bias and not self.return_bias else [None] * self.num_gemms
        rows = x.split([int(size) for size in m_splits])
        weights = [getattr(self, f"weight{index}") for index in range(self.num_gemms)]
        products = [
            multiply(group, weight, bias, self.fuse_wgrad_accumulation, self.deferred)
            for group, weight, bias in zip(rows, weights, added)
        ]
        out = torch.cat(products)
        return (out, biases) if self.return_bias else out
