"""RMSNorm in one kernel each way; the weight is multiplied before the result is rounded."""

from __future__ import annotations

import torch
from torch import Tensor

from mindspeed_llm.ops.norm import plain_weight, two_pass_rms_norm
from mindspeed_llm.ops.npu.kernels import DEVICES, FLOATS, REQUIRES
from mindspeed_llm.ops.registry import register


@register("rms_norm", "npu_rms_norm", devices=DEVICES, requires=REQUIRES, priority=1)
def npu_rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """torch_npu's, which keeps x and one number per row for its own backward kernel."""
    if x.dtype not in FLOATS or not plain_weight(x, weight, offset):
        return two_pass_rms_norm(x, weight, eps, offset)
    return torch.ops.npu.npu_rms_norm(x, weight, epsilon=eps)[0]
