"""Sums over ranks in float64, also where the collectives of a device cannot add float64 (HCCL)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_llm import accelerator


def sum_float64(values: Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Replace a float64 tensor by its sum over the ranks of `group` (None: all), the same bits on every rank.

    Where the device cannot add them the values of all ranks are exchanged and added here in order of rank, so this is
    for a handful of numbers.
    """
    if accelerator.current().reduces_float64:
        dist.all_reduce(values, group=group)
        return
    # Moved as whole numbers: a device may move float64 no better than it adds it.
    bits = values.contiguous().view(torch.int64)
    all_bits = bits.new_empty(dist.get_world_size(group) * bits.numel())
    dist.all_gather_into_tensor(all_bits, bits.flatten(), group=group)
    # Added on the host, in order of rank: the same bits everywhere.
    values.copy_(all_bits.cpu().view(torch.float64).view(-1, *values.shape).sum(0))
