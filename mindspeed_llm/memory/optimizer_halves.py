"""A fp32 number as its bf16 rounding and the rest, from which it is put together again bit for bit.

Rounding to the nearest moves a number by at most half of a bf16 step, which is 2^15 of fp32's: so the difference of the
two as integers is between -2^15 and 2^15, and 16 bits hold it but for one value. The two ends are the ties, which go to
the even bf16 number from both sides; one bit more tells from which. Carries (into the exponent, into infinity) need
nothing of their own, since bit patterns of one sign are numbered as they are ordered. A NaN stays some NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Of the 16 bits of the difference and the bit that tells ties apart, for one number.
REST_BYTES = 2 + 1 / 8
BITS = 8
# Bits 0, 9, 18, ... 63; and the lowest bit of each byte. (int64 has no larger positive number than 2^63 - 1.)
_DIAGONAL = 0x8040201008040201 - 2**64
_LOWEST = 0x0101010101010101


def split(master: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a number is kept as.

    Args:
        master: fp32 [n], n a multiple of 8.

    Returns:
        Its rounding to the nearest even, bf16 [n]; the difference, int16 [n]; ties from above, a bit each, uint8 [n/8].
    """
    weight = master.to(torch.bfloat16)
    difference = master.view(torch.int32) - _upper_half(weight)
    above = difference == 1 << 15
    # The lower halves by their place in memory: casts of what does not fit differ between devices.
    return weight, difference.view(torch.int16)[::2].contiguous(), _pack(above)


def join(weight: Tensor, rest: Tensor, above: Tensor) -> Tensor:
    """The numbers that `split` was given, fp32 [n].

    Args:
        weight, rest, above: bf16 [n], int16 [n], uint8 [n/8].
    """
    difference = rest.to(torch.int32) + (_unpack(above).to(torch.int32) << 16)
    return (_upper_half(weight) + difference).view(torch.float32)


def _upper_half(weight: Tensor) -> Tensor:
    """bf16 [n] as the integers that its values have as fp32."""
    return weight.view(torch.int16).to(torch.int32) << 16


def _pack(flags: Tensor) -> Tensor:
    """bool [n] as bits, uint8 [n/8]: of eight bytes of 0 or 1 the product moves each to a bit of its highest byte."""
    return ((flags.view(torch.int64) * _DIAGONAL) >> 56).to(torch.int32).bitwise_and_(0xFF).to(torch.uint8)


def _unpack(packed: Tensor) -> Tensor:
    """uint8 [n], 0 or 1: the product has copies of a byte nine bits apart, so each of its bytes ends in another bit."""
    return (((packed.to(torch.int64) * _DIAGONAL) >> 7) & _LOWEST).view(torch.uint8)
