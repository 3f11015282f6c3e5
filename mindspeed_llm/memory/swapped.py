"""Storages that autograd saved, on their way out of the device and back, and the tensors that are views of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from mindspeed_llm.memory.store import HostCopy, HostStore


def storage_bytes(storage: torch.UntypedStorage) -> Tensor:
    """All bytes of a storage as uint8 [n], without copying."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


class SavedStorage:
    """A storage that autograd saved: here, on its way to the host, away, or on its way back.

    Autograd holds it through `SavedView`s, so it lives exactly as long as something wants the content. After `release`
    nothing here holds the storage itself, and if nobody else does its memory is free.

    Args:
        tensor: the first of the saved tensors on it.
    """

    def __init__(self, tensor: Tensor):
        storage = tensor.untyped_storage()
        self.nbytes = storage.nbytes()
        # As long as this weak reference lives no other storage gets the same address.
        self.reference = StorageWeakRef(storage)
        # What autograd gives to a hook shares the version of what was saved.
        self._saved: Tensor | None = tensor
        self.version = tensor._version
        self._content: Tensor | None = storage_bytes(storage)
        self._copy: HostCopy | None = None
        self._fetching = False

    def holds(self, tensor: Tensor) -> bool:
        """Whether `tensor`, on a storage of the same address, has the content that was saved."""
        return not self.reference.expired() and tensor._version == self.version

    @property
    def is_dropped(self) -> bool:
        """Whether recomputation has given the memory back, and will fill it again where it is (`models.recompute`)."""
        return self._content.untyped_storage().nbytes() == 0

    def send(self, store: HostStore) -> None:
        """Begin to copy the content to the host."""
        self._copy = store.send(self._content)

    def release(self) -> bool:
        """Let go of the storage, after its copy.

        Returns:
            Whether that frees it. Where somebody else holds it the content stays where it is, and the copy is dropped.

        Raises:
            RuntimeError: the storage was written to while it was copied.
        """
        self._copy.wait_sent()
        self._check_version()
        self._saved = self._content = None
        held = torch.UntypedStorage._new_with_weak_ptr(self.reference.cdata)
        if held is None:
            return True
        self._content, self._copy = storage_bytes(held), None
        return False

    def stay(self) -> None:
        """Keep the storage after all: its backward pass has come."""
        self._copy.wait_sent()
        self._copy = None

    @property
    def is_away(self) -> bool:
        """Whether the content is on the host alone, and nobody has asked for it yet."""
        return self._content is None and not self._fetching

    @property
    def device_bytes(self) -> int:
        """Bytes of it that are on the device, or on their way there."""
        if self._content is None:
            return self.nbytes if self._fetching else 0
        return self._content.untyped_storage().nbytes()

    def fetch(self) -> None:
        """Begin to bring the content back, if it is away."""
        if self.is_away:
            self._copy.fetch()
            self._fetching = True

    def content(self) -> Tensor:
        """uint8 [nbytes] on the device, for work submitted from here on.

        Raises:
            RuntimeError: the storage was written to since it was saved.
        """
        if self._content is None:
            self.fetch()
            self._content = self._copy.wait_fetched()
            self._copy, self._fetching = None, False
        self._check_version()
        return self._content

    def _check_version(self) -> None:
        if self._saved is not None:
            check_version(self._saved, self.version)


@dataclass(frozen=True)
class SavedView:
    """What autograd holds in the place of a tensor: the storage, and where in it the tensor lies.

    Attributes:
        saver: the forward pass that saved it.
    """

    storage: SavedStorage
    saver: Any
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor, storage: SavedStorage, saver: Any) -> SavedView:
        """The view that `tensor` is of its storage."""
        return cls(storage, saver, tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset())

    def tensor(self) -> Tensor:
        """The tensor; those on one storage share it again."""
        content = self.storage.content()
        empty = torch.empty(0, dtype=self.dtype, device=content.device)
        return empty.set_(content.untyped_storage(), self.offset, self.size, self.stride)


@dataclass(frozen=True)
class SavedWhole:
    """A saved tensor that stays, and the version autograd would have checked itself were it not for the hooks."""

    value: Tensor
    version: int

    def tensor(self) -> Tensor:
        """The tensor.

        Raises:
            RuntimeError: it was written to since it was saved.
        """
        check_version(self.value, self.version)
        return self.value


def check_version(tensor: Tensor, version: int, who: str = "swap") -> None:
    """What autograd checks itself when it saves without hooks.

    Args:
        who: saves by hooks.

    Raises:
        RuntimeError: the tensor was written to since it had that version.
    """
    if tensor._version != version:
        raise RuntimeError(
            f"{who}: a tensor needed for gradient computation has been modified by an inplace operation: it has "
            f"version {tensor._version}; expected {version} instead"
        )
