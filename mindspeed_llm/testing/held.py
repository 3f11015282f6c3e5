"""Bytes that a forward pass keeps for its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def held_bytes(forward: Callable[[], Tensor], beside: Iterable[Tensor] = ()) -> tuple[Tensor, int]:
    """Run a forward pass.

    Args:
        beside: tensors that are there anyway and do not count, such as parameters.

    Returns:
        Its result, and the bytes of all storages saved in its graph, each once, as large as they are at its end.
    """
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = forward()
    there = {id_of(tensor) for tensor in beside}
    storages = {id_of(tensor): tensor.untyped_storage() for tensor in saved}
    return result, sum(storage.nbytes() for key, storage in storages.items() if key not in there)


def id_of(tensor: Tensor) -> int:
    """Two tensors have the same if they share their memory."""
    return tensor.untyped_storage()._cdata
