"""A matrix in NF4 that can be cut and put together again without changing a number in it.

The numbers of a row fill whole blocks (64 of them each), so rows can be taken, reordered and joined, and columns cut
between blocks: codes and scales move along. The 8-bit scales of a tensor share a scale and a mean in groups of 256
consecutive blocks of that whole tensor; wherever a row goes, it keeps the number of its first block there. So every
part of a tensor, under any parallel layout, stands for the very numbers that the whole tensor was rounded to.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mindspeed_llm.errors import UserError
from mindspeed_llm.ops.nf4 import BLOCK_SIZE, SCALE_BLOCK_SIZE, block_maxima, dynamic_codes, quantize_scales
from mindspeed_llm.ops.registry import implementation


@dataclass(frozen=True)
class Nf4Matrix:
    """[out, in] in NF4.

    Attributes:
        codes: uint8 [out, in / 2], as `ops.nf4.Quantized.packed`.
        scales: of the blocks, uint8 [out, in / 64] with double quantisation and fp32 without.
        first_block: int32 [out], a row's first block, counted in the blocks that `groups` describes.
        groups: fp32 [blocks / 256, 2], scale and mean of each 256 blocks; [0, 2] without double quantisation.
    """

    codes: Tensor
    scales: Tensor
    first_block: Tensor
    groups: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.codes.shape[0], self.codes.shape[1] * 2

    @property
    def num_bytes(self) -> int:
        """Bytes that are held."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors())

    @property
    def double(self) -> bool:
        """Whether the scales are quantised too."""
        return self.scales.dtype == torch.uint8

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The numbers, [out, in]; products are in fp32 and rounded once."""
        values = implementation("dequantize_nf4")(
            self.codes.view(-1), self.block_scales().view(-1), self.codes.numel() * 2, BLOCK_SIZE, dtype
        )
        return values.view(self.shape)

    def block_scales(self) -> Tensor:
        """fp32 [out, in / 64]."""
        if not self.double:
            return self.scales
        blocks = torch.arange(self.scales.shape[1], dtype=torch.int32, device=self.scales.device)
        group = (self.first_block[:, None] + blocks) // SCALE_BLOCK_SIZE
        table = dynamic_codes().to(self.scales.device)
        shape = self.scales.shape
        scale, mean = self.groups.index_select(0, group.view(-1)).unbind(1)
        return (table.index_select(0, self.scales.view(-1).int()) * scale + mean).view(shape)

    def rows(self, chosen: Tensor) -> Nf4Matrix:
        """The rows of these numbers, in their order."""
        return Nf4Matrix(self.codes[chosen], self.scales[chosen], self.first_block[chosen], self.groups)

    def cut(self, dim: int, start: int, stop: int) -> Nf4Matrix:
        """[start, stop) along dimension 0 or 1.

        Raises:
            UserError: columns are cut inside a block.
        """
        if dim == 0:
            return self.rows(torch.arange(start, stop, device=self.codes.device))
        check_blocks(start, "cut")
        check_blocks(stop, "cut")
        blocks = slice(start // BLOCK_SIZE, stop // BLOCK_SIZE)
        return Nf4Matrix(
            self.codes[:, start // 2 : stop // 2].contiguous(),
            self.scales[:, blocks].contiguous(),
            self.first_block + blocks.start,
            self.groups,
        )

    def to(self, device: torch.device) -> Nf4Matrix:
        """The matrix on a device."""
        return Nf4Matrix(*(tensor.to(device) for tensor in self._tensors()))

    def _tensors(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))


def quantize_matrix(x: Tensor, dim: int = 0, start: int = 0, stop: int | None = None) -> Nf4Matrix:
    """A part of a matrix in NF4, as it is in the NF4 of the whole: codes of [start, stop) of dimension `dim` alone.

    Args:
        x: the whole matrix, [out, in].

    Raises:
        UserError: the columns are no multiple of 64, or are cut inside a block.
    """
    out, columns = x.shape
    check_blocks(columns, "matrix")
    stop, per_row, x = x.shape[dim] if stop is None else stop, columns // BLOCK_SIZE, x.detach().contiguous()
    cut = (start, stop) != (0, x.shape[dim])
    if cut and dim == 1:
        check_blocks(start, "cut")
        check_blocks(stop, "cut")
    codes, maxima = implementation("quantize_nf4")(x.narrow(dim, start, stop - start), BLOCK_SIZE)
    whole = quantize_scales(block_maxima(x) if cut else maxima)
    groups = torch.stack((whole.scales, whole.mean.expand_as(whole.scales)), dim=1)
    first = torch.arange(out, dtype=torch.int32, device=x.device) * per_row
    scales = whole.codes.view(out, per_row)
    if dim == 0:
        scales, first = scales[start:stop].contiguous(), first[start:stop]
    else:
        scales, first = scales[:, start // BLOCK_SIZE : stop // BLOCK_SIZE].contiguous(), first + start // BLOCK_SIZE
    return Nf4Matrix(codes.view(len(scales), -1), scales, first, groups)


def join(matrices: Sequence[Nf4Matrix], order: Tensor | None = None) -> Nf4Matrix:
    """One matrix of the rows of several.

    Args:
        order: the joined rows in the order in which they are wanted; None leaves it.
    """
    if len(matrices) == 1 and order is None:
        return matrices[0]
    first, groups = [], 0
    for matrix in matrices:
        first.append(matrix.first_block + groups * SCALE_BLOCK_SIZE)
        groups += matrix.groups.shape[0]
    assert len({matrix.double for matrix in matrices}) == 1, "parts with and without double quantisation"
    joined = Nf4Matrix(
        torch.cat([matrix.codes for matrix in matrices]),
        torch.cat([matrix.scales for matrix in matrices]),
        torch.cat(first),
        torch.cat([matrix.groups for matrix in matrices]),
    )
    return joined if order is None else joined.rows(order)


def check_blocks(columns: int, what: str) -> None:
    """Refuse a number of columns, or a place between columns, that is inside a block.

    Raises:
        UserError: it is.
    """
    if columns % BLOCK_SIZE:
        raise UserError(
            f"qlora: a {what} at {columns} columns is wrong, because NF4 has one scale for {BLOCK_SIZE} numbers of a "
            f"row; legal: multiples of {BLOCK_SIZE}; try: less tensor parallelism, or LoRA without --qlora"
        )
