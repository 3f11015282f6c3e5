"""What autograd holds for backward passes while a step runs, by the part of the model that saved it.

    forward   pack  pack  pack ...          a storage counts from the first tensor on it that is saved
    backward  unpack unpack ...             until the last one is let go; the first unpack behind a pack is a summit

Recomputation empties storages (`models.recompute`) and fills them again: sizes are read anew where a layer ends and
where a tensor is asked for.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from mindspeed_llm.memory.regions import MODULES
from mindspeed_llm.memory.swap import in_backward
from mindspeed_llm.memory.swapped import check_version
from mindspeed_llm.models.layer import DecoderLayer
from mindspeed_llm.plan.activations import LAYER_INPUTS, OUTSIDE, RECOMPUTED

if TYPE_CHECKING:
    from mindspeed_llm.memory.swap import ActivationSwap

# In a layer, but in none of its modules.
SUMS = "sums and dropout"
# What swap has on the device, of all the modules that it serves.
SWAPPING = "swapped modules"


class SavedBytes:
    """Bytes of saved tensors between `begin` and `end`.

    Args:
        chunks: the model as built.
        long_lived: parameters and buffers; saving them costs nothing.
        swap: what swaps activations, which saves by hooks of its own.

    Attributes:
        peak: by part, at the moment when the sum was highest.
    """

    def __init__(
        self, chunks: Sequence[nn.Module], long_lived: Iterable[Tensor], swap: ActivationSwap | None = None
    ) -> None:
        self.peak: Counter[str] = Counter()
        self._chunks, self._swap = chunks, swap
        self._staying = {tensor.untyped_storage()._cdata for tensor in long_lived}
        self._storages: weakref.WeakValueDictionary[int, _Storage] = weakref.WeakValueDictionary()
        self._recent: list[weakref.ref[_Storage]] = []
        self._now: Counter[str] = Counter()
        self._total = self._highest = 0
        self._part, self._risen = OUTSIDE, False
        self._undo = ExitStack()

    def begin(self) -> None:
        """Watch from here on."""
        for chunk in self._chunks:
            if hasattr(chunk.decoder, "_checkpointed_forward"):
                self._name(chunk.decoder, "_checkpointed_forward", LAYER_INPUTS)
            for layer in chunk.modules():
                if isinstance(layer, DecoderLayer):
                    self._name_parts(layer)
        self._undo.enter_context(saved_tensors_hooks(self._pack, _unpack))

    def end(self) -> None:
        """Watch no longer; what is held stays with autograd."""
        self._look()
        self._undo.close()

    def _name_parts(self, layer: DecoderLayer) -> None:
        self._name(layer, "forward", SUMS, self._end_layer)
        for part, (attribute, methods) in MODULES.items():
            module = getattr(layer, attribute)
            for method in methods:
                if hasattr(module, method):
                    self._name(module, method, part)

    def _name(self, module: nn.Module, method: str, part: str, then: Callable[[], None] | None = None) -> None:
        """Let what this method of this very module saves count for a part, until the end."""
        own, original = vars(module).get(method), getattr(module, method)

        def named(*arguments: Any, **keywords: Any) -> Any:
            before, self._part = self._part, part
            try:
                return original(*arguments, **keywords)
            finally:
                self._part = before
                if then is not None:
                    then()

        setattr(module, method, functools.wraps(original)(named))
        if own is None:
            self._undo.callback(delattr, module, method)
        else:
            self._undo.callback(setattr, module, method, own)

    def _end_layer(self) -> None:
        """What the layer dropped is free now."""
        recent, self._recent = self._recent, []
        for reference in recent:
            if (storage := reference()) is not None:
                storage.measure()
        if self._swap is not None:
            self._look()

    def _pack(self, tensor: Tensor) -> _Saved:
        if tensor.layout != torch.strided or tensor.untyped_storage()._cdata in self._staying:
            return _Saved(tensor, tensor._version, None)
        key = tensor.untyped_storage()._cdata
        storage = self._storages.get(key)
        if storage is None:
            part = RECOMPUTED if in_backward() else self._part
            storage = self._storages[key] = _Storage(self, tensor.untyped_storage(), part)
            self._recent.append(weakref.ref(storage))
        return _Saved(tensor, tensor._version, storage)

    def _add(self, part: str, nbytes: int) -> None:
        self._now[part] += nbytes
        self._total += nbytes
        self._risen |= nbytes > 0

    def _look(self) -> None:
        """Remember this moment if more is held than ever before."""
        swapping = self._swap.device_bytes() if self._swap is not None else 0
        self._risen = False
        if self._total + swapping > self._highest:
            self._highest = self._total + swapping
            self.peak = +self._now
            if swapping:
                self.peak[SWAPPING] = swapping


class _Storage:
    """A storage with saved tensors on it; lives as long as autograd holds one of them."""

    def __init__(self, watch: SavedBytes, storage: torch.UntypedStorage, part: str) -> None:
        self._watch, self._storage, self._part, self._counted = watch, storage, part, 0
        self.measure()

    def measure(self) -> None:
        """Count what it has now; what was dropped and is back belongs to recomputation."""
        nbytes = self._storage.nbytes()
        if nbytes > self._counted and in_backward() and self._part != RECOMPUTED:
            self._watch._add(self._part, -self._counted)
            self._part, self._counted = RECOMPUTED, 0
        self._watch._add(self._part, nbytes - self._counted)
        self._counted = nbytes

    def asked_for(self) -> None:
        """Its backward pass has come."""
        self.measure()
        if self._watch._risen:
            self._watch._look()

    def __del__(self) -> None:
        self._watch._add(self._part, -self._counted)


class _Saved:
    """What autograd holds in the place of a tensor."""

    __slots__ = ("storage", "value", "version")

    def __init__(self, value: Tensor, version: int, storage: _Storage | None) -> None:
        self.value, self.version, self.storage = value, version, storage


def _unpack(saved: _Saved) -> Tensor:
    """The tensor that was saved.

    Raises:
        RuntimeError: it was written to since.
    """
    check_version(saved.value, saved.version, "memory report")
    if saved.storage is not None:
        saved.storage.asked_for()
    return saved.value
