"""Which keys a query sees, in the words of `npu_fusion_attention`.

The kernel takes a mask (True: hidden) and a sparse mode that says how to read it. For causal order and bands the mask
is the same 2048 x 2048 triangle for every length; only masks of other forms are handed over whole. Without a mask every
query sees every key.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

# sparse_mode
WHOLE_MASK = 1
CAUSAL = 3  # the last query sees the last key
BAND = 4  # about the diagonal through the last query and the last key
UNBOUNDED = 2147483647
TRIANGLE = 2048


@functools.cache
def triangle(device: torch.device) -> Tensor:
    """The mask of the modes that need no other."""
    return torch.ones(TRIANGLE, TRIANGLE, dtype=torch.bool, device=device).triu_(1)


def seen_in_order(s: int, s_k: int, shift: int, window_size: int | None, device: torch.device) -> dict[str, Any]:
    """Arguments under which query i sees key j where i + shift - window_size < j <= i + shift.

    Args:
        s, s_k: numbers of queries and keys; no key lies behind the last query: s_k <= s + shift.
        shift: position of the first query minus position of the first key.
        window_size: None for no lower bound.
    """
    ahead = shift - (s_k - s)  # how far the last query lies behind the last key
    assert ahead >= 0, (s, s_k, shift)
    if window_size is None or window_size >= s + shift:
        if shift >= s_k - 1:
            return {}
        if ahead == 0:
            return {"atten_mask": triangle(device), "sparse_mode": CAUSAL}
        return _band(device, UNBOUNDED, ahead)
    if window_size - 1 >= ahead:
        return _band(device, window_size - 1 - ahead, ahead)
    position = torch.arange(shift, s + shift, device=device)[:, None]
    key = torch.arange(s_k, device=device)
    return whole((key > position) | (key <= position - window_size))


def _band(device: torch.device, before: int, after: int) -> dict[str, Any]:
    mask = triangle(device)
    return {"atten_mask": mask, "sparse_mode": BAND, "pre_tockens": before, "next_tockens": after}


def whole(hidden: Tensor) -> dict[str, Any]:
    """Arguments for a mask [s, s_k] or [b or 1, 1, s, s_k] that says everything; no row may be hidden altogether."""
    return {"atten_mask": hidden, "sparse_mode": WHOLE_MASK}
