"""Hashes of tensors, computed where they lie."""

from __future__ import annotations

import torch
from torch import Tensor

ROW = 4096
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def hash_bits(tensor: Tensor) -> Tensor:
    """A number [] int64 that differs when a bit of `tensor` does; no copy to the host, no order of summation.

    Bits are read as integers; rows of 4096 are summed, and the sums added with odd factors of their own (modulo 2^64).
    Any change inside one row that does not cancel out exactly is seen.
    """
    bits = tensor.detach().reshape(-1).view(_INTEGERS[tensor.element_size()])
    whole = bits.numel() // ROW * ROW
    sums = torch.cat(
        [bits[:whole].view(-1, ROW).sum(dim=1, dtype=torch.int64), bits[whole:].sum(dtype=torch.int64)[None]]
    )
    factors = torch.arange(sums.numel(), device=sums.device) * 2 + 1
    return (sums * factors).sum()


def hash_all(tensors: list[Tensor], device: torch.device) -> Tensor:
    """[n] int64 hashes on `device`, of tensors that may be on the host."""
    if not tensors:
        return torch.zeros(0, dtype=torch.int64, device=device)
    return torch.stack([hash_bits(tensor).to(device) for tensor in tensors])
