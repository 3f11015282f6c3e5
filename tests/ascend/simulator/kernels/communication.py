"""Matrix products joined with a collective, one after the other, over the group whose communicator is named."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from simulator import hccl
from simulator.kernels.registry import kernel, require

INNER_SIZES = range(256, 65535)
# Numbers of ranks, by what the chip's name starts with.
RANKS = {"Ascend910B": (2, 4, 8), "Ascend910_93": (2, 4, 8, 16)}


def _group(rule: str, x: Tensor, weight: Tensor, hcom: str, world_size: int, unused: dict) -> hccl.HCCL:
    """The group, of a call that a device would take."""
    import torch_npu  # noqa: F401  (gives torch.npu)

    chip = torch.npu.get_device_name()
    ranks = next((sizes for start, sizes in RANKS.items() if chip.startswith(start)), ())
    require(world_size in ranks, rule, f"{world_size} ranks on {chip}")
    require(x.dtype == weight.dtype and x.dtype in (torch.float16, torch.bfloat16), rule, f"{x.dtype}, {weight.dtype}")
    require(x.dim() == weight.dim() == 2 and x.shape[1] == weight.shape[0], rule, f"{x.shape} times {weight.shape}")
    require(x.shape[1] in INNER_SIZES, rule, f"k = {x.shape[1]} is not in [256, 65535)")
    require(x.is_contiguous(), rule, "the left matrix is transposed")
    require(weight.is_contiguous() or weight.t().is_contiguous(), rule, "the right matrix has gaps")
    given = [name for name, value in unused.items() if value]
    require(not given, rule, f"{given} are not supported without quantisation")
    group = hccl.group_of(hcom)
    require(group.size() == world_size, rule, f"{hcom} has {group.size()} ranks, not {world_size}")
    return group


@kernel("npu_all_gather_base_mm")
def npu_all_gather_base_mm(self, x2, hcom, world_size, *, gather_index=0, gather_output=True, **unused):
    """x [m, k], w [k, n] -> [m ranks, n], and the gathered rows if they are asked for."""
    rule = "npu_all_gather_base_mm"
    group = _group(rule, self, x2, hcom, world_size, unused)
    require(gather_index == 0, rule, f"gather_index {gather_index}")
    parts = [torch.empty_like(self) for _ in range(world_size)]
    group.gloo.allgather([parts], [self]).wait()
    whole = torch.cat(parts)
    return whole @ x2, whole if gather_output else self.new_empty(0)


@kernel("npu_mm_reduce_scatter_base")
def npu_mm_reduce_scatter_base(self, x2, hcom, world_size, *, reduce_op="sum", **unused):
    """x [m, k], w [k, n] -> this rank's m / ranks rows of the sum of all ranks' products."""
    rule = "npu_mm_reduce_scatter_base"
    group = _group(rule, self, x2, hcom, world_size, unused)
    require(reduce_op == "sum", rule, f"reduce_op {reduce_op}")
    require(self.shape[0] % world_size == 0, rule, f"{self.shape[0]} rows over {world_size} ranks")
    total = self @ x2
    group.gloo.allreduce([total], dist.AllreduceOptions()).wait()
    return total.chunk(world_size)[group.rank()].clone()
