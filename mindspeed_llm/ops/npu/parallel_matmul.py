"""Products that send while they multiply, in one kernel each (MC2, `--use-ascend-mc2`).

They are used when selected, never by themselves: which of two kernels that share the wires and the cores is faster
depends on the shapes. There is no derivative in torch_npu; models/linear.py calls each in the other's backward pass.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_llm import accelerator
from mindspeed_llm.ops.npu.kernels import DEVICES, REQUIRES
from mindspeed_llm.ops.parallel_matmul import chunked_all_gather_matmul, chunked_matmul_reduce_scatter
from mindspeed_llm.ops.registry import register

# Limits of the kernels.
TYPES = (torch.float16, torch.bfloat16)
INNER_SIZES = range(256, 65535)


def _fits(x: Tensor, group: dist.ProcessGroup) -> bool:
    ranks = accelerator.get("npu").ranks_of_fused_communication()
    return x.dtype in TYPES and group.size() in ranks and x.shape[-1] in INNER_SIZES and x.numel() > 0


def _communicator(group: dist.ProcessGroup, device: torch.device) -> str:
    """HCCL's name of the group's communicator."""
    return group._get_backend(device).get_hccl_comm_name(dist.get_rank())


@register("all_gather_matmul", "npu_all_gather_base_mm", devices=DEVICES, requires=REQUIRES, priority=-2)
def npu_all_gather_matmul(x: Tensor, weight: Tensor, group: dist.ProcessGroup, chunks: int) -> tuple[Tensor, Tensor]:
    """As `ops.parallel_matmul.all_gather_matmul`."""
    if not _fits(x, group):
        return chunked_all_gather_matmul(x, weight, group, chunks)
    y, gathered = torch.ops.npu.npu_all_gather_base_mm(
        x.flatten(0, -2).contiguous(), weight.t(), _communicator(group, x.device), group.size(), gather_output=True
    )
    middle = x.shape[1:-1]
    return y.view(-1, *middle, weight.shape[0]), gathered.view(-1, *x.shape[1:])


@register("matmul_reduce_scatter", "npu_mm_reduce_scatter_base", devices=DEVICES, requires=REQUIRES, priority=-2)
def npu_matmul_reduce_scatter(x: Tensor, weight: Tensor, group: dist.ProcessGroup, chunks: int) -> Tensor:
    """As `ops.parallel_matmul.matmul_reduce_scatter`."""
    if not _fits(x, group):
        return chunked_matmul_reduce_scatter(x, weight, group, chunks)
    y = torch.ops.npu.npu_mm_reduce_scatter_base(
        x.flatten(0, -2).contiguous(), weight.t(), _communicator(group, x.device), group.size(), reduce_op="sum"
    )
    return y.view(-1, *x.shape[1:-1], weight.shape[0])
