"""torch_npu's operators computed by plain formulas, from its documentation. Sums are formed in fp32.

What the documentation forbids is refused: a call that a device would not take must not pass here either.
"""

from __future__ import annotations

import importlib

import torch

from simulator.host import on_host
from simulator.kernels.registry import KERNELS

FILES = ("attention", "communication", "elementwise", "grouped_matmul", "optimizer", "routing")
# Kernels whose lengths are on the host.
MIXING = ("npu_fusion_attention_v3", "npu_fusion_attention_grad_v3")
_libraries: list[torch.library.Library] = []


def register() -> int:
    """Enter all kernels for the device.

    Returns:
        How many there are.
    """
    for name in FILES:
        importlib.import_module(f"simulator.kernels.{name}")
    library = torch.library.Library("npu", "IMPL")
    _libraries.append(library)
    for name, kernel in KERNELS.items():
        library.impl(f"npu::{name}", on_host(kernel, mixes=name in MIXING), "PrivateUse1", allow_override=True)
    return len(KERNELS)
