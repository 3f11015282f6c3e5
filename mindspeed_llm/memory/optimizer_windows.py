"""AdamW over state that is not fp32 on the device: bf16 moments, masters without their weight's half, or on the host.

All trained parameters of an optimizer stand one after the other in arrays, one for each kind of state. Windows of these
come from the host and go back beside each other and beside the computation:

    in       0    1    2    3
    AdamW         0    1    2    3
    out           0    1    2    3

A window comes after the one before the last has gone, so that the device holds two. Within a window chunks are made
fp32, stepped by the AdamW operator, and stored again. Every value is computed as without all this, whatever the windows
and chunks; rounding of moments to bf16 (to the nearest, ties to even) is the one thing that changes numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mindspeed_llm.checkpoint.optimizer_state import MOMENTS, OwnState, is_mixed
from mindspeed_llm.config.memory import STEP_VALUES
from mindspeed_llm.memory.optimizer_arrays import Array, DeviceArray, HostArray
from mindspeed_llm.memory.optimizer_halves import BITS
from mindspeed_llm.memory.optimizer_masters import Masters, OwnMasters, Piece, Slot, SplitMasters, WholeMasters
from mindspeed_llm.memory.store import HostStore
from mindspeed_llm.ops.adamw import FusedAdamW, Rates, adamw_

# Slots and chunks begin at multiples of this: kernels compute whole vectors alike wherever they begin, but not their
# tails. 64 floats are two of the widest vectors of a CPU, a cache line of bf16, and the bytes of eight bits each.
ALIGNMENT = 64


@dataclass(frozen=True)
class StateForm:
    """How the state of an optimizer is kept.

    Attributes:
        moments: their type.
        split: bf16 weights are a half of their fp32 masters.
        store: memory of the host for everything; None keeps it on the device.
        windows: in how many parts it comes from there.
    """

    moments: torch.dtype = torch.float32
    split: bool = False
    store: HostStore | None = None
    windows: int = 1

    @property
    def moves_masters(self) -> bool:
        """Whether fp32 weights leave the optimizer's own tensors."""
        return self.split or self.store is not None


@dataclass(frozen=True)
class Chunk:
    """Neighbouring values [start, stop) that are computed at once."""

    start: int
    stop: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Window:
    """Neighbouring values [start, stop) that are on the device at once, and what has their masters."""

    start: int
    stop: int
    chunks: tuple[Chunk, ...]
    masters: Masters


class StoredState:
    """The state of one optimizer in arrays.

    Args:
        states: of its parameters, those held here.
        groups: number of each main's parameter group, by its id.
    """

    def __init__(self, states: Sequence[OwnState], groups: dict[int, int], form: StateForm):
        self.form = form
        mixed = [s for s in states if is_mixed(s.parameter)]
        whole = [s for s in states if not is_mixed(s.parameter)]
        self.slots: list[Slot] = []
        boundary = self._place(mixed, groups, 0)
        end = self._place(whole, groups, boundary)
        device = states[0].main.device
        self.moments = tuple(self._array(end, form.moments, device) for _ in MOMENTS)
        masters = self._masters(boundary, device)
        self.arrays = (*self.moments, *masters.arrays)
        size = max(_up(-(-end // form.windows), ALIGNMENT), ALIGNMENT)
        self.windows = [
            *_windows(self.slots[: len(mixed)], 0, boundary, size, masters),
            *_windows(self.slots[len(mixed) :], boundary, end, size, OwnMasters()),
        ]
        self._masters_of = {id(slot.main): (slot, masters) for slot in self.slots[: len(mixed)]}

    def _place(self, states: Sequence[OwnState], groups: dict[int, int], at: int) -> int:
        for own in states:
            weight = own.parameter.detach().view(-1)[own.start : own.stop] if is_mixed(own.parameter) else None
            self.slots.append(Slot(own.main, own.parameter, weight, groups[id(own.main)], at))
            at += _up(own.main.numel(), ALIGNMENT)
        return at

    def _array(self, numel: int, dtype: torch.dtype, device: torch.device, each: int = 1) -> Array:
        if self.form.store is None or not numel:
            return DeviceArray(numel, dtype, device, each)
        return HostArray(self.form.store, numel, dtype, each)

    def _masters(self, numel: int, device: torch.device) -> Masters:
        if self.form.split:
            rest = self._array(numel, torch.int16, device)
            return SplitMasters(rest, self._array(numel, torch.uint8, device, each=BITS))
        if self.form.moves_masters:
            return WholeMasters(self._array(numel, torch.float32, device))
        return OwnMasters()

    def moments_of(self, slot: Slot) -> dict[str, Tensor]:
        """Views of a slot's moments, in its shape."""
        stop = slot.start + slot.numel
        return {
            name: array.values[slot.start : stop].view(slot.main.shape)
            for name, array in zip(MOMENTS, self.moments, strict=True)
        }

    def settle(self) -> None:
        """Wait until the host has what the last step computed."""
        for array in self.arrays:
            array.settle()

    def master(self, main: Tensor) -> Tensor:
        """See `checkpoint.optimizer_state.StateElsewhere`."""
        slot, masters = self._masters_of[id(main)]
        return masters.values(slot)

    def accept(self, main: Tensor, values: Tensor) -> None:
        """See `checkpoint.optimizer_state.StateElsewhere`."""
        slot, masters = self._masters_of[id(main)]
        masters.accept(slot, values)

    def device_tensors(self) -> Iterator[Tensor]:
        """See `checkpoint.optimizer_state.StateElsewhere`."""
        yield from (array.values for array in self.arrays if isinstance(array, DeviceArray))
        yield from (slot.main for slot in self.slots)

    def reload(self) -> None:
        """Take the model's weights for all masters."""
        for slot, masters in self._masters_of.values():
            masters.reload(slot)

    def each_window(self, update: Callable[[Window, list[Tensor]], None]) -> None:
        """Call `update` with every window and its values in the arrays, which it changes in place."""
        arrays = [(*self.moments, *window.masters.arrays) for window in self.windows]
        for number, window in enumerate(self.windows):
            if number == 0:
                _fetch(arrays[0], window)
            stored = [array.wait_fetched(window.start, window.stop) for array in arrays[number]]
            if number > 0:
                _wait_sent(arrays[number - 1], self.windows[number - 1])
            if number + 1 < len(self.windows):
                _fetch(arrays[number + 1], self.windows[number + 1])
            update(window, stored)
            for array, stretch in zip(arrays[number], stored, strict=True):
                array.send(window.start, stretch)
            del stored, stretch  # the array has them until they are sent
        if self.windows:
            _wait_sent(arrays[-1], self.windows[-1])


def _fetch(arrays: Sequence[Array], window: Window) -> None:
    for array in arrays:
        array.fetch(window.start, window.stop)


def _wait_sent(arrays: Sequence[Array], window: Window) -> None:
    for array in arrays:
        array.wait_sent(window.start)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _windows(slots: Sequence[Slot], start: int, stop: int, size: int, masters: Masters) -> list[Window]:
    """[start, stop) in windows of at most `size`."""
    return [
        Window(at, min(at + size, stop), tuple(_chunks(slots, at, min(at + size, stop))), masters)
        for at in range(start, stop, size)
    ]


def _chunks(slots: Sequence[Slot], start: int, stop: int) -> list[Chunk]:
    chunks = []
    for at in range(start, stop, STEP_VALUES):
        end = min(at + STEP_VALUES, stop)
        cuts = [(s, max(at - s.start, 0), min(end - s.start, s.numel)) for s in slots]
        pieces = tuple(Piece(s, first, last, s.start + first - at) for s, first, last in cuts if first < last)
        chunks.append(Chunk(at, end, pieces))
    return chunks


class WindowedAdamW(FusedAdamW):
    """AdamW by the operator, whose state is a `StoredState`."""

    elsewhere: StoredState

    @classmethod
    def rearrange(cls, part: Any, states: Sequence[OwnState], form: StateForm) -> None:
        """Let an optimizer of megatron-core that has taken no step go on with its state in this form.

        Args:
            states: what it holds on this rank, at least one.
        """
        inner = part.optimizer
        cls.take_over(inner)
        groups = {id(main): number for number, group in enumerate(inner.param_groups) for main in group["params"]}
        stored = inner.elsewhere = StoredState(states, groups, form)
        for slot in stored.slots:
            step = torch.zeros((), dtype=torch.float32, device=slot.main.device)
            inner.state[slot.main] = {"step": step, **stored.moments_of(slot)}
        if form.moves_masters:
            stored.reload()
            for slot in stored.slots:
                if slot.weight is not None:
                    # Whoever reads it gets what is no number, and nobody keeps memory for it.
                    nothing = torch.full((), torch.nan, dtype=slot.main.dtype, device=slot.main.device)
                    slot.main.data = nothing.expand(slot.main.shape)
            # The step writes the weights, window by window.
            part._copy_main_params_to_model_params = lambda: None
            part._copy_model_params_to_main_params = lambda state_dict=None: stored.reload()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient.

        Raises:
            ValueError: a closure is given; the loss is not computed again here.
        """
        if closure is not None:
            raise ValueError("closure must be None")
        self.elsewhere.each_window(self._update)
        steps = [self.state[slot.main]["step"] for slot in self.elsewhere.slots if slot.main.grad is not None]
        if steps:
            torch._foreach_add_(steps, 1)

    def _update(self, window: Window, stored: Sequence[Tensor]) -> None:
        for chunk in window.chunks:
            here = [_chunk_of(values, chunk, window) for values in stored]
            narrow, masters = here[: len(MOMENTS)], here[len(MOMENTS) :]
            moments = [moment.float() for moment in narrow]
            pieces = window.masters.take(chunk.pieces, masters)
            for number, group in enumerate(self.param_groups):
                self._step_group(number, group, chunk, pieces, moments)
            window.masters.give(chunk.pieces, pieces, masters)
            for kept, computed in zip(narrow, moments, strict=True):
                if kept is not computed:
                    kept.copy_(computed)

    def _step_group(
        self, number: int, group: dict[str, Any], chunk: Chunk, masters: Sequence[Tensor], moments: Sequence[Tensor]
    ) -> None:
        ours = [
            (piece, master)
            for piece, master in zip(chunk.pieces, masters, strict=True)
            if piece.slot.group == number and piece.slot.main.grad is not None
        ]
        rates = Rates(float(group["lr"]), *group["betas"], group["eps"], group["weight_decay"])
        first, second = moments
        adamw_(
            [master for _, master in ours],
            [p.slot.main.grad.view(-1)[p.begin : p.end] for p, _ in ours],
            [p.of(first) for p, _ in ours],
            [p.of(second) for p, _ in ours],
            # The operator counts; a parameter may be in several chunks.
            [self.state[p.slot.main]["step"].clone() for p, _ in ours],
            rates,
        )


def _chunk_of(values: Tensor, chunk: Chunk, window: Window) -> Tensor:
    """The values of a chunk among those of its window, of which one stands for `each` numbers."""
    each = (window.stop - window.start) // values.numel()
    return values[(chunk.start - window.start) // each : (chunk.stop - window.start) // each]
