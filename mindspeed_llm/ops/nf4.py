"""NF4: 4-bit codes for quantiles of a normal distribution, with one scale for each block of consecutive numbers.

    scale_b = max |x| over block b;  code = index of the entry of NF4 nearest to x / scale_b;  x' = NF4[code] * scale_b

Double quantisation keeps the scales themselves in 8 bits: their mean is subtracted and the rest quantised in blocks of
256 to the 256 values of `dynamic_codes`. Two codes share a byte, the first in its upper half. Codes, scales and results
are bit for bit those of bitsandbytes 0.50's rule in torch (its compiled CPU code rounds a few 8-bit scales otherwise).
Sources: arXiv 2305.14314 (NF4), arXiv 1511.04561 (dynamic values).
"""

from __future__ import annotations

import functools
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
# Blocks that are taken out of NF4 at once on a CPU: their numbers in fp32 (256 KiB) stay in its cache.
PIECE_BLOCKS = 1024
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
    """uint8 [numel / 2] and fp32 [blocks], by binary search among the middles of neighbouring values."""
    codes, scales = _nearest(x, torch.tensor(NF4, device=x.device), block_size)
    if codes.numel() % 2:
        # The half byte after the last number holds the code of zero.
        codes = torch.nn.functional.pad(codes, (0, 1), value=NF4.index(0.0))
    return (codes[::2] << 4) | codes[1::2], scales


@register("dequantize_nf4", "torch")
def torch_dequantize_nf4(packed: Tensor, scales: Tensor, count: int, block_size: int, dtype: torch.dtype) -> Tensor:
    """[count] of dtype: both numbers of a byte are looked up at once, in a table of 256 pairs, a piece at a time."""
    pairs = _pairs(packed.device)
    blocks = scales.numel()
    out = torch.empty(blocks * block_size, dtype=dtype, device=packed.device)
    packed = torch.nn.functional.pad(packed, (0, out.numel() // 2 - packed.numel()))
    step = PIECE_BLOCKS if packed.device.type == "cpu" else max(blocks, 1)
    for start in range(0, blocks, step):
        stop = min(start + step, blocks)
        bytes_of_piece = packed[start * block_size // 2 : stop * block_size // 2]
        values = pairs.index_select(0, bytes_of_piece.int()).view(torch.float32).view(-1, block_size)
        torch.mul(values, scales[start:stop, None], out=values)
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
