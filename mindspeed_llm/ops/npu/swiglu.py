"""SwiGLU in one kernel each way."""

from __future__ import annotations

import torch
from torch import Tensor

from mindspeed_llm.ops.npu.kernels import DEVICES, FLOATS, REQUIRES
from mindspeed_llm.ops.registry import register
from mindspeed_llm.ops.swiglu import torch_swiglu


@register("swiglu", "npu_swiglu", devices=DEVICES, requires=REQUIRES, priority=1)
def npu_swiglu(gate_up: Tensor) -> Tensor:
    """torch_npu's, with its own backward kernel."""
    if gate_up.dtype not in FLOATS:
        return torch_swiglu(gate_up)
    return torch.ops.npu.npu_swiglu(gate_up, dim=-1)
