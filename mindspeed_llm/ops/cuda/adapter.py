"""Products with a low-rank adapter by Triton kernels of our own: neither torch nor Liger-Kernel has them.

Dropout is part of the kernels that read its input: no mask and no dropped copy is written, kept or read. They are used
only when selected (`--lora-kernels`), because nobody has measured them on a GPU yet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mindspeed_llm.accelerator.ranges import named
from mindspeed_llm.ops import adapter
from mindspeed_llm.ops.adapter import CounterMask
from mindspeed_llm.ops.registry import register

DEVICES = ("cuda",)
REQUIRES = ("triton",)
# Types that the kernels compute in; float64 goes elsewhere.
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def fits(*tensors: Tensor) -> bool:
    """Whether the kernels take them: all of one of their types, none empty."""
    return tensors[0].dtype in FLOATS and all(t.dtype == tensors[0].dtype and t.numel() for t in tensors)


def _rows(x: Tensor) -> Tensor:
    """[..., k] as [m, k] with adjacent columns."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


@register("adapter_down", "triton", devices=DEVICES, requires=REQUIRES, priority=-2)
def triton_adapter_down(x: Tensor, lora_a: Tensor, mask: CounterMask | None) -> Tensor:
    """One kernel; reads x once for ranks of up to 64 (32 in fp32)."""
    if not fits(x, lora_a):
        return adapter.torch_adapter_down(x, lora_a, mask)
    from mindspeed_llm.ops.cuda.adapter_kernels import launch_down

    narrow = x.new_empty(*x.shape[:-1], lora_a.shape[0])
    launch_down(_rows(x), _rows(lora_a), narrow.view(-1, lora_a.shape[0]), mask).run()
    return narrow


@register("adapter_down_gradient", "triton", devices=DEVICES, requires=REQUIRES, priority=-2)
def triton_adapter_down_gradient(grad: Tensor, x: Tensor, mask: CounterMask | None) -> Tensor:
    """One kernel."""
    if not fits(grad, x):
        return adapter.torch_adapter_down_gradient(grad, x, mask)
    from mindspeed_llm.ops.cuda.adapter_kernels import launch_down_gradient

    grad_a = x.new_empty(grad.shape[-1], x.shape[-1])
    launch_down_gradient(_rows(grad).contiguous(), _rows(x), grad_a, mask).run()
    return grad_a


@register("adapter_up", "triton", devices=DEVICES, requires=REQUIRES, priority=-2)
def triton_adapter_up(total: Tensor, narrow: Tensor, lora_b: Tensor, scale: float, mask: CounterMask | None) -> Tensor:
    """One kernel, in place; a total with gaps is torch's."""
    if not fits(total, narrow, lora_b) or not total.is_contiguous():
        return adapter.torch_adapter_up(total, narrow, lora_b, scale, mask)
    from mindspeed_llm.ops.cuda.adapter_kernels import launch_up

    launch_up(total.view(-1, total.shape[-1]), _rows(narrow).contiguous(), lora_b, scale, mask).run()
    return total


@register("adapted_product", "triton", devices=DEVICES, requires=REQUIRES, priority=-2)
def triton_adapted_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    narrow: Tensor,
    lora_b: Tensor,
    scale: float,
    mask: CounterMask | None,
) -> Tensor:
    """Base and adapter in one kernel: the result is written once."""
    if not fits(x, weight, narrow, lora_b, *(() if bias is None else (bias,))):
        return adapter.torch_adapted_product(x, weight, bias, narrow, lora_b, scale, mask)
    from mindspeed_llm.ops.cuda.adapter_kernels import launch_adapted_product

    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    flat = y.view(-1, weight.shape[0])
    with named("lora: base product and adapter up"):
        launch_adapted_product(_rows(x), weight, bias, _rows(narrow).contiguous(), lora_b, flat, scale, mask).run()
    return y
