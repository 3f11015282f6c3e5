"""Half-precision gradients added to their fp32 sums on a CPU a few rows at a time.

megatron-core adds a gradient to `main_grad` as a whole, for which torch makes an fp32 copy of it there. Here the same
sum, bit for bit, is made as soon as the gradient has arrived, and megatron-core is told that it has been counted.
Figures stand in docs/benchmarks.md.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from mindspeed_llm.ops import matmul_accumulate


def add_gradients_by_rows(parameters: Iterable[nn.Parameter]) -> None:
    """Let every large gradient of another type than its `main_grad` be added so.

    Args:
        parameters: inside megatron-core's DistributedDataParallel, whose own hooks run after these.
    """
    for parameter in parameters:
        large = parameter.device.type == "cpu" and parameter.numel() >= matmul_accumulate.LEAST_BLOCKED
        if large and parameter.requires_grad and parameter.main_grad.dtype != parameter.dtype:
            parameter.register_post_accumulate_grad_hook(_add)


def _add(parameter: nn.Parameter) -> None:
    if getattr(parameter, "zero_out_wgrad", False):
        return  # megatron-core adds this one whether it is marked or not
    matmul_accumulate.add_widened(parameter.main_grad, parameter.grad)
    parameter.grad_added_to_main_grad = True
