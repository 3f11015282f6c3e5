"""Where the fp32 weights of mixed precision are between two steps, and how a chunk of them is had for a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from mindspeed_llm.memory.optimizer_arrays import Array
from mindspeed_llm.memory.optimizer_halves import BITS, join, split


@dataclass(frozen=True)
class Slot:
    """One tensor that the optimizer updates, and where its state lies in the arrays.

    Attributes:
        main: the optimizer's tensor, which has the gradient, and the values unless these are elsewhere.
        parameter: the model's.
        weight: what the model computes with, a view [n] of 16 bits; None where that is `main`.
        group: number of its parameter group.
        start: place of its first value in the arrays.
    """

    main: Tensor
    parameter: nn.Parameter
    weight: Tensor | None
    group: int
    start: int

    @property
    def numel(self) -> int:
        """Number of its values."""
        return self.main.numel()


@dataclass(frozen=True)
class Piece:
    """A stretch [begin, end) of a slot's values, as far as a chunk goes.

    Attributes:
        at: where it begins in the chunk.
    """

    slot: Slot
    begin: int
    end: int
    at: int

    def of(self, chunk: Tensor) -> Tensor:
        """Its values in a chunk [n]."""
        return chunk[self.at : self.at + self.end - self.begin]

    def weight(self) -> Tensor:
        """Its 16-bit weights, a view."""
        return self.slot.weight[self.begin : self.end]


class Masters(Protocol):
    """The fp32 weights of a part's slots.

    Attributes:
        arrays: what of them is in arrays.
    """

    arrays: Sequence[Array]

    def take(self, pieces: Sequence[Piece], stored: Sequence[Tensor]) -> list[Tensor]:
        """The pieces of a chunk in fp32, which the step changes in place.

        Args:
            stored: the chunk's values in `arrays`.
        """

    def give(self, pieces: Sequence[Piece], masters: Sequence[Tensor], stored: Sequence[Tensor]) -> None:
        """Put back what `take` gave, and round it into the weights, where those are others."""

    def values(self, slot: Slot) -> Tensor:
        """The fp32 weights of a slot in its shape, to read and to write; it may be a copy."""

    def accept(self, slot: Slot, values: Tensor) -> None:
        """`values` gave this, and it has been written to."""

    def reload(self, slot: Slot) -> None:
        """Take the weights of the model for a slot's."""


class OwnMasters:
    """See `Masters`: the optimizer's tensors have them, and megatron-core rounds them into the weights."""

    arrays: Sequence[Array] = ()

    def take(self, pieces: Sequence[Piece], stored: Sequence[Tensor]) -> list[Tensor]:
        """Views of the optimizer's tensors."""
        return [p.slot.main.detach().view(-1)[p.begin : p.end] for p in pieces]

    def give(self, pieces: Sequence[Piece], masters: Sequence[Tensor], stored: Sequence[Tensor]) -> None:
        """Nothing: they were views."""

    def values(self, slot: Slot) -> Tensor:
        """The tensor."""
        return slot.main.detach()

    def accept(self, slot: Slot, values: Tensor) -> None:
        """Nothing: that was the tensor."""

    def reload(self, slot: Slot) -> None:
        """Nothing: megatron-core does."""


class WholeMasters:
    """See `Masters`: fp32 in an array.

    Args:
        values: fp32 [n].
    """

    def __init__(self, values: Array):
        self.arrays = (values,)

    def take(self, pieces: Sequence[Piece], stored: Sequence[Tensor]) -> list[Tensor]:
        """Views of the chunk."""
        return [p.of(stored[0]) for p in pieces]

    def give(self, pieces: Sequence[Piece], masters: Sequence[Tensor], stored: Sequence[Tensor]) -> None:
        """Round them into the weights."""
        for piece, master in zip(pieces, masters, strict=True):
            piece.weight().copy_(master)

    def values(self, slot: Slot) -> Tensor:
        """A view of the array."""
        self.arrays[0].settle()
        return self.arrays[0].values[slot.start : slot.start + slot.numel].view(slot.main.shape)

    def accept(self, slot: Slot, values: Tensor) -> None:
        """Nothing: that was the array."""

    def reload(self, slot: Slot) -> None:
        """Widen the weights."""
        self.values(slot).view(-1).copy_(slot.weight)


class SplitMasters:
    """See `Masters`: the bf16 weight is one half, and the other one is in arrays (`optimizer_halves`).

    Args:
        rest, above: int16 [n], and a bit for each of them.
    """

    def __init__(self, rest: Array, above: Array):
        self.arrays = (rest, above)

    def take(self, pieces: Sequence[Piece], stored: Sequence[Tensor]) -> list[Tensor]:
        """Parts of a chunk that the halves have been joined to."""
        joined = self._join([(p.at, p.weight()) for p in pieces], *stored)
        return [p.of(joined) for p in pieces]

    def give(self, pieces: Sequence[Piece], masters: Sequence[Tensor], stored: Sequence[Tensor]) -> None:
        """Split the chunk again."""
        rest, above = stored
        joined = torch.zeros(rest.numel(), dtype=torch.float32, device=rest.device)
        for piece, master in zip(pieces, masters, strict=True):
            piece.of(joined).copy_(master)
        weight, new_rest, new_above = split(joined)
        for piece in pieces:
            piece.weight().copy_(piece.of(weight))
        rest.copy_(new_rest)
        above.copy_(new_above)

    def values(self, slot: Slot) -> Tensor:
        """A copy on the host, since the device was to be spared: fp32 needs another two bytes of each number."""
        rest, above = self._stretch(slot)
        joined = self._join([(0, slot.weight)], rest.to(slot.weight.device), above.to(slot.weight.device))
        return joined[: slot.numel].to("cpu").view(slot.main.shape)

    def accept(self, slot: Slot, values: Tensor) -> None:
        """Split the values, the weight's half included."""
        rest, above = self._stretch(slot)
        padded = torch.zeros(rest.numel(), dtype=torch.float32, device=slot.weight.device)
        padded[: slot.numel].copy_(values.view(-1))
        weight, new_rest, new_above = split(padded)
        slot.weight.copy_(weight[: slot.numel])
        rest.copy_(new_rest)
        above.copy_(new_above)

    def reload(self, slot: Slot) -> None:
        """Nothing is left of what the weights are a rounding of."""
        for half in self._stretch(slot):
            half.zero_()

    def _stretch(self, slot: Slot) -> tuple[Tensor, Tensor]:
        """Both arrays' values of a slot, up to the next whole byte of bits."""
        rest, above = self.arrays
        rest.settle(), above.settle()
        stop = -(-(slot.start + slot.numel) // BITS) * BITS
        return rest.values[slot.start : stop], above.values[slot.start // BITS : stop // BITS]

    @staticmethod
    def _join(weights: Sequence[tuple[int, Tensor]], rest: Tensor, above: Tensor) -> Tensor:
        """fp32 [n]; `weights` are where each begins in it, and zeros fill the gaps."""
        dense = torch.zeros(rest.numel(), dtype=torch.bfloat16, device=rest.device)
        for at, weight in weights:
            dense[at : at + weight.numel()].copy_(weight)
        return join(dense, rest, above)
