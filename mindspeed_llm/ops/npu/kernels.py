"""What torch_npu's kernels have in common."""

from __future__ import annotations

import torch

DEVICES = ("npu",)
REQUIRES = ("torch_npu",)
# Types that the kernels compute in; float64 goes elsewhere.
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
