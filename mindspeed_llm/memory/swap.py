"""Activation swap: what the layers save for the backward pass lies on the host until shortly before it is needed.

    forward of layer      0         1         2         3
    copies out              0 ----    1 ----    2 ----
    layer 3's backward pass follows its forward pass at once: it keeps its tensors
    backward of layer     3         2         1         0
    copies back           2 ----    1 ----    0 ----

A copy out begins when autograd saves a tensor and has until the end of the next layer's forward pass; then the
computing queue waits for it and the tensor is let go. A copy back begins with the backward pass of the layer that runs
before (`Order` knows which), and the computing queue waits for it where autograd asks for the tensor. Idea: MindSpeed's
swap-attention; unlike there nothing is resized under anybody's feet: memory is freed by nobody holding it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import Parameter

from mindspeed_llm import accelerator
from mindspeed_llm.config.memory import SMALL_BYTES
from mindspeed_llm.memory.allowance import UpToHostBytes, WhatHides
from mindspeed_llm.memory.order import Event, Order
from mindspeed_llm.memory.store import HostStore
from mindspeed_llm.memory.swapped import SavedStorage, SavedView, SavedWhole


class LayerPass:
    """One forward pass of one layer (or, under recomputation, one kept input), and what it saved.

    Args:
        number: among the forward passes of a round, see `Order`.
        place: which layer of which chunk this is.
    """

    def __init__(self, swap: ActivationSwap, number: int, place: Hashable):
        self.swap, self.number, self.place = swap, number, place
        # Until the pass has ended; then autograd alone holds them, but for those under way.
        self._saved: list[SavedStorage] = []
        self._leaving: list[tuple[int, SavedStorage]] = []
        self._swapped: weakref.WeakSet[SavedStorage] = weakref.WeakSet()

    def saving(self) -> AbstractContextManager:
        """Context in which saved tensors go through here."""
        return saved_tensors_hooks(self.pack, unpack)

    def pack(self, tensor: Tensor) -> SavedView | SavedWhole:
        """What autograd is to hold in the place of `tensor`."""
        if not self.swap.may_go(tensor):
            return SavedWhole(tensor, tensor._version)
        storage = self.swap.known(tensor)
        if storage is None:
            storage = self.swap.remember(tensor)
            self._saved.append(storage)
        return SavedView.of(tensor, storage, self)

    def send(self) -> int:
        """Begin to copy out what may go, now that everything is saved.

        Returns:
            Bytes that go.
        """
        saved, self._saved = self._saved, []
        if self.swap.order.returns_at_once(self.number):
            return 0
        offered = {
            ordinal: storage.nbytes
            for ordinal, storage in enumerate(saved)
            if (self.place, ordinal) not in self.swap.held_elsewhere and not storage.is_dropped
        }
        self._leaving = [(ordinal, saved[ordinal]) for ordinal in self.swap.allowance.choose(offered)]
        for _, storage in self._leaving:
            storage.send(self.swap.store)
            self._swapped.add(storage)
        return sum(storage.nbytes for _, storage in self._leaving)

    def release(self) -> None:
        """Let go of what was copied out."""
        leaving, self._leaving = self._leaving, []
        for ordinal, storage in leaving:
            if storage.release():
                self.swap.swapped_bytes += storage.nbytes
            else:
                self.swap.held_elsewhere.add((self.place, ordinal))

    def stay(self) -> None:
        """Keep what was not let go yet: the backward pass has come."""
        leaving, self._leaving = self._leaving, []
        for _, storage in leaving:
            storage.stay()

    def fetch(self) -> None:
        """Begin to bring back what is away."""
        for storage in list(self._swapped):
            storage.fetch()


def unpack(saved: SavedView | SavedWhole) -> Tensor:
    """The tensor that autograd saved."""
    if isinstance(saved, SavedView):
        saved.saver.swap.begin_backward(saved.saver)
        saved.saver.swap.late += saved.storage.is_away
    return saved.tensor()


def in_backward() -> bool:
    """Whether this thread is inside a backward pass, where layers only run to be recomputed."""
    return torch._C._current_graph_task_id() != -1


class ActivationSwap:
    """The swap of one process, over all its chunks of the model.

    Args:
        store: where tensors go.
        allowance: how much may go; `UpToHostBytes` or `WhatHides`.
        long_lived: parameters and buffers, asked for when training begins: neither they nor what shares their storage
            goes.
        say: called with a line for the log.
        small: storages below so many bytes stay.

    Attributes:
        running: the forward pass of a layer that is under way.
        held_elsewhere: (place, which storage) of what others were seen to hold beyond a layer's forward pass.
        swapped_bytes: let go since the process began.
        late: storages that were asked for before anything had begun to bring them back.
    """

    def __init__(
        self,
        store: HostStore,
        allowance: UpToHostBytes | WhatHides,
        long_lived: Callable[[], Iterable[Tensor]] = tuple,
        say: Callable[[str], None] = lambda line: None,
        small: int = SMALL_BYTES,
    ):
        self.store, self.allowance, self.small = store, allowance, small
        self.order = Order()
        self.running: LayerPass | None = None
        self.held_elsewhere: set[tuple[Hashable, int]] = set()
        self.swapped_bytes = self.late = 0
        self._long_lived, self._say = long_lived, say
        self._device_type = accelerator.current().device_type
        self._passes: weakref.WeakValueDictionary[int, LayerPass] = weakref.WeakValueDictionary()
        self._outstanding: weakref.WeakSet[LayerPass] = weakref.WeakSet()
        self._leaving: LayerPass | None = None
        self._storages: weakref.WeakValueDictionary[int, SavedStorage] = weakref.WeakValueDictionary()
        self._every: weakref.WeakSet[SavedStorage] = weakref.WeakSet()
        self._count = self._rounds = 0
        self._parameters: set[int] | None = None
        self._staying: set[int] = set()

    def begin_chunk(self, given: Iterable[Tensor]) -> None:
        """The forward pass of a chunk begins; its caller holds what it was given, so moving that frees nothing."""
        if self._parameters is None:
            self._parameters = {t.untyped_storage()._cdata for t in self._long_lived()}
        self._staying = self._parameters | {t.untyped_storage()._cdata for t in given}

    def may_go(self, tensor: Tensor) -> bool:
        """Whether the storage of a saved tensor is of a kind that is swapped."""
        plain = type(tensor) in (Tensor, Parameter) and tensor.layout == torch.strided
        if not plain or tensor.device.type != self._device_type or tensor.is_conj() or tensor.is_neg():
            return False
        storage = tensor.untyped_storage()
        return storage.nbytes() >= self.small and storage._cdata not in self._staying

    def known(self, tensor: Tensor) -> SavedStorage | None:
        """What was remembered of a saved tensor's storage, if its content is still the same."""
        known = self._storages.get(tensor.untyped_storage()._cdata)
        return known if known is not None and known.holds(tensor) else None

    def remember(self, tensor: Tensor) -> SavedStorage:
        """A saved tensor's storage, for the tensors on it that are saved later."""
        storage = self._storages[tensor.untyped_storage()._cdata] = SavedStorage(tensor)
        self._every.add(storage)
        return storage

    def device_bytes(self) -> int:
        """Bytes of what was saved that are on the device, or on their way there."""
        return sum(storage.device_bytes for storage in list(self._every))

    def begin_layer(self, place: Hashable) -> LayerPass:
        """The forward pass of a layer begins."""
        if not self._outstanding and (self.order.has_begun or not self._count):
            self._begin_round()
        self.running = LayerPass(self, self._count, place)
        self._count += 1
        return self.running

    def end_layer(self, output: Tensor) -> None:
        """It has ended with this output, whose gradient is where its backward pass begins."""
        layer = self.running
        if output.requires_grad:
            output.register_hook(lambda gradient: self.begin_backward(layer))
            self._end()
        self.running = None

    def end_input(self) -> None:
        """A recomputed layer has run, and this pass saved its input, which its backward pass asks for first."""
        self._end()
        self.running = None

    def _end(self) -> None:
        layer = self.running
        self.allowance.end_layer(layer.send())
        self._passes[layer.number] = layer
        self._outstanding.add(layer)
        self._happened(Event(False, layer.number))
        self._leaving = layer

    def begin_backward(self, layer: LayerPass) -> None:
        """The backward pass of a layer begins; whatever notices it says so."""
        if layer not in self._outstanding:
            return
        self._outstanding.discard(layer)
        if self._leaving is layer:
            layer.stay()
            self._leaving = None
        self._happened(Event(True, layer.number))

    def _happened(self, event: Event) -> None:
        leaving, self._leaving = self._leaving, None
        if leaving is not None:
            leaving.release()
        self.order.see(event)
        following = self.order.next_backward()
        if following is not None and (layer := self._passes.get(following)) in self._outstanding:
            layer.fetch()

    def _begin_round(self) -> None:
        self.order.begin()
        self._count = 0
        self._rounds += 1
        if self._rounds == 3 and not self.swapped_bytes:
            self._say("swap: nothing moves: no saved tensor is large enough, or every one is needed at once")
        if line := self.allowance.begin_round():
            self._say(line)
