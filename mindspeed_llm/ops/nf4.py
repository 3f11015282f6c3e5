"""NF4: 4-bit codes for quantiles of a normal distribution, with one scale for each block of consecutive numbers.

    scale_b = max |x| over block b;  code = index of the entry of NF4 nearest to x / scale_b;  x' = NF4[code] * scale_b

Double quantisation keeps the scales themselves in 8 bits: their mean is subtracted and the rest quantised in blocks of
256 to the 256 values of `dynamic_codes`. Two codes share a byte, the first in its upper half. Codes, scales and results
are bit for bit those of bitsandbytes 0.50's rule in torch (its compiled CPU code rounds a few 8-bit scales otherwise).
Sources: arXiv 2305.14314 (NF4), arXiv 1511.04561 (dynamic values).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mindspeed_llm.ops.registry import REFERENCE, implementation, register

# The table bitsandbytes publishes; quantiles of N(0, 1) at the limits of equally likely bins, scaled to [-1, 1].
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
BLOCK_SIZE = 64
# Scales that share a scale of their own.
SCALE_BLOCK_SIZE = 256
# Blocks that a thread of a CPU works on at once: their numbers in fp32 (128 KiB) stay in its cache.
PIECE_BLOCKS = 512
# Cells of [-1, 1] in the search for the nearest value: few enough for a small table, with one middle each at most.
CELLS = 64
# A block of zeros has no scale to divide by.
SMALLEST_SCALE = 1e-38


@dataclass(frozen=True)
class Scales:
    """Block scales in 8 bits: dynamic_codes[codes] * scales of their blocks + mean.

    Args:
        codes: uint8 [blocks].
        scales: fp32 [blocks / 256, rounded up].
        mean: fp32 scalar.
    """

    codes: Tensor
    scales: Tensor
    mean: Tensor

    def values(self) -> Tensor:
        """fp32 [blocks]."""
        table = dynamic_codes().to(self.codes.device)
        return _by_blocks(table[self.codes.long()], self.scales, SCALE_BLOCK_SIZE) + self.mean


@dataclass(frozen=True)
class Quantized:
    """A tensor in NF4.

    Args:
        packed: uint8 [numel / 2, rounded up].
        scales: fp32 [blocks], or `Scales`.
        shape, dtype: of the tensor.
        block_size: numbers that share a scale.
    """

    packed: Tensor
    scales: Tensor | Scales
    shape: torch.Size
    dtype: torch.dtype
    block_size: int


def quantize_nf4(x: Tensor, block_size: int = BLOCK_SIZE, double: bool = True) -> Quantized:
    """Quantise a floating-point tensor of any shape.

    Args:
        block_size: consecutive numbers that share a scale, an even number.
        double: keep the scales in 8 bits.

    Raises:
        ValueError: block_size is not even and positive.
    """
    if block_size < 2 or block_size % 2:
        raise ValueError(f"block_size {block_size} is wrong; legal: even numbers from 2")
    packed, scales = implementation("quantize_nf4")(x.detach(), block_size)
    return Quantized(packed, quantize_scales(scales) if double else scales, x.shape, x.dtype, block_size)


def dequantize_nf4(quantized: Quantized, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor again, of its own dtype unless another is asked for; products are in fp32 and rounded once."""
    scales = quantized.scales.values() if isinstance(quantized.scales, Scales) else quantized.scales
    values = implementation("dequantize_nf4")(
        quantized.packed, scales, quantized.shape.numel(), quantized.block_size, dtype or quantized.dtype
    )
    return values.view(quantized.shape)


@functools.cache
def dynamic_codes() -> Tensor:
    """The 256 values of the signed dynamic 8-bit type, ascending: for each of seven decades twice as many fractions."""
    values = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        middles = 10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [middles, -middles]
    return torch.cat(values).sort().values


def quantize_scales(scales: Tensor) -> Scales:
    """Block scales, fp32 [blocks], in 8 bits."""
    mean = scales.mean()
    codes, own = _nearest(scales - mean, dynamic_codes().to(scales.device), SCALE_BLOCK_SIZE)
    return Scales(codes, own, mean)


def _nearest(x: Tensor, table: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """uint8 index of the table's entry (ascending) nearest to each number over its block's scale, and the scales."""
    flat = x.reshape(-1).float()
    count = flat.numel()
    padded = torch.nn.functional.pad(flat, (0, -count % block_size)).view(-1, block_size)
    scales = padded.abs().amax(-1)
    scaled = (padded * (1.0 / scales.clamp(min=SMALLEST_SCALE))[:, None]).clamp_(-1, 1)
    middles = (table[:-1] + table[1:]) / 2
    return torch.bucketize(scaled, middles, out_int32=True).to(torch.uint8).view(-1)[:count], scales


def _by_blocks(values: Tensor, scales: Tensor, block_size: int) -> Tensor:
    count = values.numel()
    padded = torch.nn.functional.pad(values, (0, -count % block_size)).view(-1, block_size)
    return (padded * scales[:, None]).view(-1)[:count]


@register("quantize_nf4", "torch")
def torch_quantize_nf4(x: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """uint8 [numel / 2] and fp32 [blocks], a piece at a time."""
    flat, count = x.reshape(-1), x.numel()
    blocks = -(-count // block_size)
    packed = torch.empty(blocks * block_size // 2, dtype=torch.uint8, device=x.device)
    scales = torch.empty(blocks, dtype=torch.float32, device=x.device)
    for start, stop in _pieces(blocks, x.device):
        piece = flat[start * block_size : stop * block_size].float()
        if piece.numel() % block_size:
            # The half byte after the last number holds the code of zero.
            piece = torch.nn.functional.pad(piece, (0, -piece.numel() % block_size))
        piece = piece.view(-1, block_size)
        torch.amax(piece.abs(), -1, out=scales[start:stop])
        scaled = piece * (1.0 / scales[start:stop].clamp(min=SMALLEST_SCALE))[:, None]
        # Two codes as one number of 16 bits, the first in its lower byte.
        both = _nearest_codes(scaled.view(-1)).to(torch.uint8).view(torch.int16)
        packed[start * block_size // 2 : stop * block_size // 2] = (both << 4).bitwise_or_(both >> 8)
    return packed[: (count + 1) // 2], scales


def block_maxima(x: Tensor, block_size: int = BLOCK_SIZE) -> Tensor:
    """Largest absolute value of each block, fp32 [blocks], of a contiguous tensor that is whole blocks."""
    by_block = x.view(-1, block_size)
    scales = torch.empty(len(by_block), dtype=torch.float32, device=x.device)
    for start, stop in _pieces(len(by_block), x.device):
        torch.amax(by_block[start:stop].float().abs(), -1, out=scales[start:stop])
    return scales


def _pieces(blocks: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """[start, stop) of the blocks that are worked on at once: all of them but on a CPU."""
    step = PIECE_BLOCKS * torch.get_num_threads() if device.type == "cpu" else max(blocks, 1)
    for start in range(0, blocks, step):
        yield start, min(start + step, blocks)


def _nearest_codes(scaled: Tensor) -> Tensor:
    """int32 index of the value nearest to each number within [-1, 1]; of two equally near ones the smaller.

    The code is the number of middles between neighbouring values that are below x. [-1, 1] is divided into cells of
    which none has two middles: for a cell a table knows how many lie in the cells before, and the one inside, if any,
    is compared. Which cell a number is in grows with the number however it is rounded, so the count is exact.
    """
    before, inside = _cells(scaled.device)
    cells = _cell_of(scaled)
    # The sign of the difference as 0 or -1: a comparison and its sum with other types take four times as long.
    above = inside.index_select(0, cells).sub_(scaled).view(torch.int32).bitwise_right_shift_(31)
    return before.index_select(0, cells).sub_(above)


def _cell_of(scaled: Tensor) -> Tensor:
    return torch.add(scaled.new_tensor(CELLS / 2), scaled, alpha=CELLS / 2).int()


@functools.lru_cache(maxsize=8)
def _cells(device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each cell: how many middles lie before it, int32, and the one in it, fp32, or infinity."""
    table = torch.tensor(NF4)
    middles = (table[:-1] + table[1:]) / 2
    cells = _cell_of(middles).tolist()
    assert len(set(cells)) == len(cells), "two middles in a cell"
    before = torch.tensor([sum(cell < at for cell in cells) for at in range(CELLS + 1)], dtype=torch.int32)
    inside = torch.full((CELLS + 1,), torch.inf)
    inside[torch.tensor(cells)] = middles
    return before.to(device), inside.to(device)


@register("dequantize_nf4", "torch")
def torch_dequantize_nf4(packed: Tensor, scales: Tensor, count: int, block_size: int, dtype: torch.dtype) -> Tensor:
    """[count] of dtype: both numbers of a byte are looked up at once, in a table of 256 pairs, a piece at a time."""
    pairs, blocks = _pairs(packed.device), scales.numel()
    out = torch.empty(blocks * block_size, dtype=dtype, device=packed.device)
    if 2 * packed.numel() < out.numel():
        packed = torch.nn.functional.pad(packed, (0, out.numel() // 2 - packed.numel()))
    looked_up = None
    for start, stop in _pieces(blocks, packed.device):
        piece = packed[start * block_size // 2 : stop * block_size // 2].int()
        if looked_up is None or looked_up.numel() != piece.numel():
            looked_up = torch.empty(piece.numel(), dtype=torch.int64, device=packed.device)
        values = torch.index_select(pairs, 0, piece, out=looked_up).view(torch.float32).view(-1, block_size)
        values.mul_(scales[start:stop, None])
        out[start * block_size : stop * block_size].copy_(values.view(-1))
    return out[:count]


@functools.lru_cache(maxsize=8)
def _pairs(device: torch.device) -> Tensor:
    """The two fp32 values that each byte stands for, as one number of 64 bits: [256]."""
    values = torch.tensor(NF4, device=device)
    return torch.cartesian_prod(values, values).view(torch.int64).view(-1)


@register("quantize_nf4", REFERENCE, priority=-1)
def quantize_reference(x: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """The formula: the distance to every value of the table; of two equally near ones the smaller."""
    table = torch.tensor(NF4, device=x.device)
    scales, codes = [], []
    for block in x.reshape(-1).float().split(block_size) if x.numel() else ():
        scales.append(block.abs().max())
        scaled = block * (1.0 / scales[-1].clamp(min=SMALLEST_SCALE))
        codes.append((scaled[:, None] - table).abs().argmin(-1).to(torch.uint8))
    flat = torch.cat(codes) if codes else torch.empty(0, dtype=torch.uint8, device=x.device)
    first, second = flat[::2], flat[1::2]
    if len(second) < len(first):
        second = torch.cat((second, second.new_tensor([NF4.index(0.0)])))
    return first * 16 + second, torch.stack(scales) if scales else x.new_empty(0, dtype=torch.float32)


@register("dequantize_nf4", REFERENCE, priority=-1)
def dequantize_reference(packed: Tensor, scales: Tensor, count: int, block_size: int, dtype: torch.dtype) -> Tensor:
    """The formula, number by number; products are in fp32 and rounded once."""
    codes = torch.stack((packed >> 4, packed & 15), dim=-1).view(-1)[:count].long()
    table = torch.tensor(NF4, device=packed.device)
    return (table[codes] * scales[torch.arange(count, device=packed.device) // block_size]).to(dtype)
