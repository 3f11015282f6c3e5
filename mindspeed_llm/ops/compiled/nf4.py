"""NF4 as one kernel each way: codes by counting the middles below a number, numbers by a table of what a byte holds."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mindspeed_llm.ops.compiled import enter
from mindspeed_llm.ops.compiled.kernel import kernel
from mindspeed_llm.ops.nf4 import NF4, SMALLEST_SCALE, torch_dequantize_nf4, torch_quantize_nf4


@enter("quantize_nf4")
def compiled_quantize_nf4(x: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """uint8 [numel / 2] and fp32 [blocks]; numbers that are no whole blocks go another way."""
    blocks, rest = divmod(x.numel(), block_size)
    if rest or blocks < 2:
        return torch_quantize_nf4(x, block_size)
    packed, scales = encode(x.detach().reshape(blocks, block_size // 2, 2).contiguous(), _middles())
    return packed.view(-1), scales.view(-1)


@enter("dequantize_nf4")
def compiled_dequantize_nf4(packed: Tensor, scales: Tensor, count: int, block_size: int, dtype: torch.dtype) -> Tensor:
    """[count] of dtype; numbers that are no whole blocks go another way."""
    blocks, rest = divmod(count, block_size)
    if rest or blocks < 2:
        return torch_dequantize_nf4(packed, scales, count, block_size, dtype)
    by_block = packed.view(blocks, block_size // 2)
    return decode(by_block, scales.reshape(blocks, 1).contiguous(), _pairs(), dtype=dtype).view(-1)


@kernel("r pairs 2", "middles")
def encode(x: Tensor, middles: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of the blocks' pairs [r, pairs] in a byte each, and the blocks' scales."""
    wide = x.float()
    scales = wide.abs().amax((1, 2))
    scaled = wide * (1.0 / scales.clamp(min=SMALLEST_SCALE))[:, None, None]
    # As fp32 the counts are as wide as what is compared.
    codes = sum((scaled > middles[number]).float() for number in range(len(NF4) - 1)).to(torch.uint8)
    return (codes[..., 0] << 4) | codes[..., 1], scales


@kernel("r bytes", "r 1", "values 2")
def decode(packed: Tensor, scales: Tensor, pairs: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Numbers [r, bytes, 2]; products are in fp32 and rounded once."""
    return (pairs[packed.int()] * scales[:, :, None]).to(dtype)


@functools.cache
def _middles() -> Tensor:
    """Between neighbouring values, fp32 [15]."""
    table = torch.tensor(NF4)
    return (table[:-1] + table[1:]) / 2


@functools.cache
def _pairs() -> Tensor:
    """The two values of each byte, fp32 [256, 2]."""
    values = torch.tensor(NF4)
    return torch.cartesian_prod(values, values)
