"""Triton kernels of ops/adapter.py, and how each is launched for given tensors.

Every kernel makes the dropout mask from seed, row and column again, sums in fp32 and rounds once. No kernel adds into
memory from several programs: equal inputs give equal bits. A `Launch` is everything a call needs, so that the same
one can be run on a device, interpreted, or compiled for a device that is not there.

Not measured on a GPU: tile sizes follow from what has to fit (shared memory of an A100 with the stages of its
pipeline) and from how many programs a layer of an 8B model makes, not from timings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mindspeed_llm.ops.adapter import CounterMask


@triton.jit
def _kept(seed, rows, first_column, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """`CounterMask.kept` of a tile: bool [ROWS, COLUMNS] from column `first_column`, a multiple of 8."""
    groups = first_column // 8 + tl.arange(0, COLUMNS // 8)
    zero = tl.zeros((ROWS, COLUMNS // 8), tl.int32)
    a, b, c, d = tl.philox(seed, zero + rows[:, None], zero + groups[None, :], zero, zero)
    words = tl.join(tl.join(a, c), tl.join(b, d))
    halves = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(halves, (ROWS, COLUMNS)).to(tl.int32) >= threshold


@triton.jit
def down_kernel(
    x, lora_a, narrow, seed, num_rows, width, rank, stride_x, stride_a, threshold, factor,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_RANK: tl.constexpr,
):  # fmt: skip
    """narrow = factor (kept o x) A^T: a program has its rows of x, read once for each BLOCK_RANK of the rank."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    ranks = tl.program_id(1) * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
    own_rows, own_ranks = rows[:, None] < num_rows, ranks[:, None] < rank
    x_rows = x + rows[:, None].to(tl.int64) * stride_x
    a_rows = lora_a + ranks[:, None].to(tl.int64) * stride_a
    if MASKED:
        key = tl.load(seed)
    total = tl.zeros((BLOCK_ROWS, BLOCK_RANK), tl.float32)
    for first in range(0, width, BLOCK_WIDTH):
        columns = first + tl.arange(0, BLOCK_WIDTH)[None, :]
        x_tile = tl.load(x_rows + columns, mask=own_rows & (columns < width), other=0.0)
        if MASKED:
            x_tile = tl.where(_kept(key, rows, first, threshold, BLOCK_ROWS, BLOCK_WIDTH), x_tile, 0.0)
        a_tile = tl.load(a_rows + columns, mask=own_ranks & (columns < width), other=0.0)
        total = tl.dot(x_tile, tl.trans(a_tile), total, input_precision=PRECISION)
    if MASKED:
        total *= factor
    places = narrow + rows[:, None].to(tl.int64) * rank + ranks[None, :]
    tl.store(places, total.to(narrow.dtype.element_ty), mask=own_rows & (ranks[None, :] < rank))


@triton.jit
def down_gradient_kernel(
    grad, x, grad_a, seed, num_rows, width, rank, stride_x, threshold, factor,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_RANK: tl.constexpr,
):  # fmt: skip
    """grad_a = factor grad^T (kept o x): a program has its columns of x and walks down all rows."""
    first_column = tl.program_id(0) * BLOCK_WIDTH
    columns = first_column + tl.arange(0, BLOCK_WIDTH)[None, :]
    ranks = tl.program_id(1) * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
    if MASKED:
        key = tl.load(seed)
    total = tl.zeros((BLOCK_RANK, BLOCK_WIDTH), tl.float32)
    for first in range(0, num_rows, BLOCK_ROWS):
        rows = first + tl.arange(0, BLOCK_ROWS)
        own_rows, far = rows[:, None] < num_rows, rows[:, None].to(tl.int64)
        grad_tile = tl.load(grad + far * rank + ranks[None, :], mask=own_rows & (ranks[None, :] < rank), other=0.0)
        x_tile = tl.load(x + far * stride_x + columns, mask=own_rows & (columns < width), other=0.0)
        if MASKED:
            x_tile = tl.where(_kept(key, rows, first_column, threshold, BLOCK_ROWS, BLOCK_WIDTH), x_tile, 0.0)
        total = tl.dot(tl.trans(grad_tile), x_tile, total, input_precision=PRECISION)
    if MASKED:
        total *= factor
    places = grad_a + ranks[:, None].to(tl.int64) * width + columns
    tl.store(places, total.to(grad_a.dtype.element_ty), mask=(ranks[:, None] < rank) & (columns < width))


@triton.jit
def _up(
    narrow, lora_b, seed, rows, columns, first_column, num_rows, outer, rank, stride_b, stride_rank, threshold, factor,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_OUTER: tl.constexpr, BLOCK_RANK: tl.constexpr,
):  # fmt: skip
    """factor kept o (narrow B^T) of a tile, fp32 [BLOCK_ROWS, BLOCK_OUTER]."""
    total = tl.zeros((BLOCK_ROWS, BLOCK_OUTER), tl.float32)
    narrow_rows = narrow + rows[:, None].to(tl.int64) * rank
    b_columns = lora_b + columns[None, :].to(tl.int64) * stride_b
    for first in range(0, rank, BLOCK_RANK):
        ranks = first + tl.arange(0, BLOCK_RANK)
        narrow_tile = tl.load(
            narrow_rows + ranks[None, :], mask=(rows[:, None] < num_rows) & (ranks[None, :] < rank), other=0.0
        )
        b_tile = tl.load(
            b_columns + ranks[:, None].to(tl.int64) * stride_rank,
            mask=(ranks[:, None] < rank) & (columns[None, :] < outer),
            other=0.0,
        )
        total = tl.dot(narrow_tile, b_tile, total, input_precision=PRECISION)
    total *= factor
    if MASKED:
        kept = _kept(tl.load(seed), rows, first_column, threshold, BLOCK_ROWS, BLOCK_OUTER)
        total = tl.where(kept, total, 0.0)
    return total


@triton.jit
def up_kernel(
    total, narrow, lora_b, seed, num_rows, outer, rank, stride_b, stride_rank, threshold, factor,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_OUTER: tl.constexpr, BLOCK_RANK: tl.constexpr,
):  # fmt: skip
    """total += factor kept o (narrow B^T)."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    first_column = tl.program_id(1) * BLOCK_OUTER
    columns = first_column + tl.arange(0, BLOCK_OUTER)
    added = _up(
        narrow, lora_b, seed, rows, columns, first_column, num_rows, outer, rank, stride_b, stride_rank, threshold,
        factor, MASKED, PRECISION, BLOCK_ROWS, BLOCK_OUTER, BLOCK_RANK,
    )  # fmt: skip
    places = total + rows[:, None].to(tl.int64) * outer + columns[None, :]
    inside = (rows[:, None] < num_rows) & (columns[None, :] < outer)
    before = tl.load(places, mask=inside, other=0.0)
    tl.store(places, (before + added).to(total.dtype.element_ty), mask=inside)


@triton.jit
def adapted_product_kernel(
    x, weight, bias, narrow, lora_b, y, seed, num_rows, width, outer, rank,
    stride_x, stride_w, stride_k, stride_b, stride_rank, threshold, factor,
    HAS_BIAS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_OUTER: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_RANK: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """y = x W^T + bias + factor kept o (narrow B^T), tile by tile.

    The adapter's product comes first and the base's is added to it: one accumulator serves both. GROUP tiles below
    each other are computed before the next column, so that their columns of W are still in the cache.
    """
    number, tiles_down, tiles_across = tl.program_id(0), tl.cdiv(num_rows, BLOCK_ROWS), tl.cdiv(outer, BLOCK_OUTER)
    first_down = number // (GROUP * tiles_across) * GROUP
    height = tl.minimum(tiles_down - first_down, GROUP)
    down = first_down + number % (GROUP * tiles_across) % height
    first_column = number % (GROUP * tiles_across) // height * BLOCK_OUTER
    rows, columns = down * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS), first_column + tl.arange(0, BLOCK_OUTER)
    total = _up(
        narrow, lora_b, seed, rows, columns, first_column, num_rows, outer, rank, stride_b, stride_rank, threshold,
        factor, MASKED, PRECISION, BLOCK_ROWS, BLOCK_OUTER, BLOCK_RANK,
    )  # fmt: skip
    x_rows = x + rows[:, None].to(tl.int64) * stride_x
    w_columns = weight + columns[None, :].to(tl.int64) * stride_w
    for first in range(0, width, BLOCK_WIDTH):
        inner = first + tl.arange(0, BLOCK_WIDTH)
        x_tile = tl.load(x_rows + inner[None, :], mask=(rows[:, None] < num_rows) & (inner[None, :] < width), other=0.0)
        w_tile = tl.load(
            w_columns + inner[:, None].to(tl.int64) * stride_k,
            mask=(inner[:, None] < width) & (columns[None, :] < outer),
            other=0.0,
        )
        total = tl.dot(x_tile, w_tile, total, input_precision=PRECISION)
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=columns < outer, other=0.0)[None, :]
    places = y + rows[:, None].to(tl.int64) * outer + columns[None, :]
    tl.store(places, total.to(y.dtype.element_ty), mask=(rows[:, None] < num_rows) & (columns[None, :] < outer))


@dataclass(frozen=True)
class Launch:
    """A call of a kernel.

    Args:
        grid: programs along each axis.
        arguments, constants: by the kernel's names; constants are compiled in.
        num_warps, num_stages: of a program, and of its pipeline of loads.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int

    def run(self) -> None:
        """On the device of the tensors."""
        options = dict(num_warps=self.num_warps, num_stages=self.num_stages)
        self.kernel[self.grid](**self.arguments, **self.constants, **options)


def precision() -> str:
    """How fp32 factors are multiplied: as torch's own products are, in tf32 only where the user allows it."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _rank_block(rank: int, largest: int) -> int:
    """16 is the smallest side of a product on tensor cores."""
    return min(max(triton.next_power_of_2(rank), 16), largest)


def _masked(mask: CounterMask | None, like: Tensor, scale: float = 1.0) -> tuple[dict[str, Any], dict[str, Any]]:
    """(seed, threshold and the factor of the result, constant MASKED); without a mask the seed is not read."""
    if mask is None:
        return dict(seed=like, threshold=0, factor=scale), dict(MASKED=False, PRECISION=precision())
    found = dict(seed=mask.seed, threshold=mask.threshold, factor=scale * mask.gain)
    return found, dict(MASKED=True, PRECISION=precision())


def launch_down(x: Tensor, lora_a: Tensor, narrow: Tensor, mask: CounterMask | None) -> Launch:
    """x [m, k] with adjacent columns, A [R, k] likewise, narrow [m, R] without gaps, which is written."""
    (num_rows, width), rank, wide = x.shape, lora_a.shape[0], x.element_size() > 2
    found, constants = _masked(mask, x)
    # Few rows for a program: 4096 tokens make 128 of them, and an A100 has 108 multiprocessors.
    constants |= dict(BLOCK_ROWS=32, BLOCK_WIDTH=32 if wide else 64, BLOCK_RANK=_rank_block(rank, 32 if wide else 64))
    grid = (triton.cdiv(num_rows, 32), triton.cdiv(rank, constants["BLOCK_RANK"]))
    arguments = dict(
        x=x, lora_a=lora_a, narrow=narrow, num_rows=num_rows, width=width, rank=rank, stride_x=x.stride(0),
        stride_a=lora_a.stride(0), **found,
    )  # fmt: skip
    return Launch(down_kernel, grid, arguments, constants, num_warps=4, num_stages=3)


def launch_down_gradient(grad: Tensor, x: Tensor, grad_a: Tensor, mask: CounterMask | None) -> Launch:
    """grad [m, R] and grad_a [R, k] without gaps, the second written; x [m, k] with adjacent columns."""
    (num_rows, width), rank, wide = x.shape, grad.shape[1], x.element_size() > 2
    found, constants = _masked(mask, x)
    # Few columns for a program, as above: 4096 channels make 128.
    constants |= dict(BLOCK_ROWS=32 if wide else 64, BLOCK_WIDTH=32, BLOCK_RANK=_rank_block(rank, 32 if wide else 64))
    grid = (triton.cdiv(width, 32), triton.cdiv(rank, constants["BLOCK_RANK"]))
    arguments = dict(
        grad=grad, x=x, grad_a=grad_a, num_rows=num_rows, width=width, rank=rank, stride_x=x.stride(0),
        **found,
    )  # fmt: skip
    return Launch(down_gradient_kernel, grid, arguments, constants, num_warps=4, num_stages=4)


def launch_up(total: Tensor, narrow: Tensor, lora_b: Tensor, scale: float, mask: CounterMask | None) -> Launch:
    """total [m, n] and narrow [m, R] without gaps, the first added to; B [n, R] with any strides."""
    (num_rows, outer), rank = total.shape, narrow.shape[1]
    found, constants = _masked(mask, total, scale)
    constants |= dict(BLOCK_ROWS=64, BLOCK_OUTER=64, BLOCK_RANK=_rank_block(rank, 32))
    arguments = dict(
        total=total, narrow=narrow, lora_b=lora_b, num_rows=num_rows, outer=outer, rank=rank,
        stride_b=lora_b.stride(0), stride_rank=lora_b.stride(1), **found,
    )  # fmt: skip
    grid = (triton.cdiv(num_rows, 64), triton.cdiv(outer, 64))
    return Launch(up_kernel, grid, arguments, constants, num_warps=4, num_stages=2)


def launch_adapted_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    narrow: Tensor,
    lora_b: Tensor,
    y: Tensor,
    scale: float,
    mask: CounterMask | None,
) -> Launch:
    """x [m, k] with adjacent columns, W [n, k] and B [n, R] with any strides, narrow and y without gaps, y written."""
    (num_rows, width), (outer, rank), wide = x.shape, lora_b.shape, x.element_size() > 2
    found, constants = _masked(mask, x, scale)
    side, depth = (64, 32) if wide else (128, 64)
    constants |= dict(
        HAS_BIAS=bias is not None, BLOCK_ROWS=side, BLOCK_OUTER=side, BLOCK_WIDTH=depth,
        BLOCK_RANK=_rank_block(rank, 32), GROUP=8,
    )  # fmt: skip
    arguments = dict(
        x=x, weight=weight, bias=x if bias is None else bias, narrow=narrow, lora_b=lora_b, y=y, num_rows=num_rows,
        width=width, outer=outer, rank=rank, stride_x=x.stride(0), stride_w=weight.stride(0),
        stride_k=weight.stride(1), stride_b=lora_b.stride(0), stride_rank=lora_b.stride(1), **found,
    )  # fmt: skip
    grid = (triton.cdiv(num_rows, side) * triton.cdiv(outer, side),)
    return Launch(adapted_product_kernel, grid, arguments, constants, num_warps=4 if wide else 8, num_stages=3)
