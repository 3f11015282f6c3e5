"""A rank's part of a matrix in NF4, cut from the logical parts and put together again, and its form in mp_rank files.

    x.weight.nf4_codes          uint8 [out, in / 2], in megatron-core's order of rows
    x.weight.nf4_scales         uint8 [out, in / 64]
    x.weight.nf4_first_block    int32 [out]
    x.weight.nf4_groups         fp32 [blocks / 256, 2]: every rank has those of the whole matrix, part after part

Nothing is rounded on either way: what is put together are the very codes and scales that the whole part had.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mindspeed_llm.checkpoint.source import holds_parts, part_sizes, rows_of_part
from mindspeed_llm.models import layouts, packing
from mindspeed_llm.models.mapping import TensorPair, to_hf
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.ops.nf4 import BLOCK_SIZE, SCALE_BLOCK_SIZE
from mindspeed_llm.ops.nf4_matrix import Nf4Matrix, check_blocks, join, quantize_matrix

FIELDS = tuple(field.name for field in dataclasses.fields(Nf4Matrix))
_MARK = ".nf4_"


def shard(
    read: Callable[[int, int, int], Nf4Matrix], pair: TensorPair, shape: ModelShape, rank: int, size: int
) -> Nf4Matrix:
    """What one of `size` ranks holds of a tensor, in megatron-core's order of rows.

    Args:
        read: (logical part, start, stop) -> that range of the part along the dimension that is cut.
    """
    if pair.layout.tp_dim is None:
        rank, size = 0, 1
    ranges = [layouts.shard_range(length, rank, size) for length in part_sizes(pair, shape)]
    parts = [read(index, *bounds) for index, bounds in enumerate(ranges)]
    if len(parts) == 1:
        return parts[0]
    numbers = torch.arange(sum(part.shape[0] for part in parts), device=parts[0].codes.device)
    split = numbers.split([part.shape[0] for part in parts])
    return join(parts, packing.pack(split, pair.layout.packing, shape, size))


def quantized_shards(tensor: Tensor, pair: TensorPair, shape: ModelShape) -> Callable[[int, int], Nf4Matrix]:
    """(rank, size) -> that rank's part of an unsharded tensor, quantised as Hugging Face's tensors of it are."""
    dim = pair.layout.tp_dim or 0
    whole = [quantize_matrix(stored) for _, stored in to_hf(pair, tensor, shape)]
    if holds_parts(pair, shape):
        whole = [whole[0].rows(rows_of_part(pair, shape, part)) for part in range(len(part_sizes(pair, shape)))]
    return lambda rank, size: shard(lambda part, *bounds: whole[part].cut(dim, *bounds), pair, shape, rank, size)


def unshard(
    shards: Sequence[Nf4Matrix], pair: TensorPair, shape: ModelShape, part: int, start: int, stop: int
) -> Nf4Matrix:
    """[start, stop) of a logical part along the cut dimension, from all ranks' shards: as `quantize_matrix` gives it.

    Raises:
        UserError: columns are cut inside a block.
    """
    dim = pair.layout.tp_dim or 0
    pieces = [_rows_of_part(one, pair, shape, len(shards), part) for one in shards]
    counts = group_counts(pair, shape)
    first = sum(counts[:part])
    codes, scales = (torch.cat([getattr(one, name) for one in pieces], dim) for name in ("codes", "scales"))
    blocks = pieces[0].first_block if dim == 1 else torch.cat([one.first_block for one in pieces])
    groups = shards[0].groups[first : first + counts[part]]
    return Nf4Matrix(codes, scales, blocks - first * SCALE_BLOCK_SIZE, groups).cut(dim, start, stop)


def _rows_of_part(matrix: Nf4Matrix, pair: TensorPair, shape: ModelShape, size: int, part: int) -> Nf4Matrix:
    if len(part_sizes(pair, shape)) == 1:
        return matrix
    return matrix.rows(packing.unpack(torch.arange(matrix.shape[0]), pair.layout.packing, shape, size)[part])


def group_counts(pair: TensorPair, shape: ModelShape) -> list[int]:
    """Of each logical part, how many groups of 256 blocks share a scale and a mean.

    Parts that are one tensor of Hugging Face have all of that one's, each its own copy.
    """
    rows, columns = pair.dims
    sizes = part_sizes(pair, shape)
    if holds_parts(pair, shape) or len(sizes) == 1:
        numbers = [rows * columns] * len(sizes)
    else:
        numbers = [size * columns for size in sizes]
    return [-(-count // (BLOCK_SIZE * SCALE_BLOCK_SIZE)) for count in numbers]


def stored_fields(
    name: str, pair: TensorPair, shape: ModelShape, dims: tuple[int, int]
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name -> shape and type of what a rank's file holds in the place of `name`.

    Args:
        dims: of the rank's part.

    Raises:
        UserError: its columns are no whole blocks.
    """
    out, columns = dims
    check_blocks(columns, f"part of {name}")
    kinds = {
        "codes": ((out, columns // 2), torch.uint8),
        "scales": ((out, columns // BLOCK_SIZE), torch.uint8),
        "first_block": ((out,), torch.int32),
        "groups": ((sum(group_counts(pair, shape)), 2), torch.float32),
    }
    return {f"{name}{_MARK}{field}": kinds[field] for field in FIELDS}


def fields_of(name: str, matrix: Nf4Matrix) -> dict[str, Tensor]:
    """The tensors of `stored_fields`."""
    return {f"{name}{_MARK}{field}": getattr(matrix, field) for field in FIELDS}


def weight_of(name: str) -> str | None:
    """The weight that a tensor in a file belongs to: None for all fields but one, and the name itself for others."""
    weight, mark, field = name.rpartition(_MARK)
    if not mark:
        return name
    return weight if field == FIELDS[0] else None


def matrix_in(content: Mapping[str, Tensor], name: str) -> Nf4Matrix | None:
    """A rank's part of a weight in NF4, None where the weight is stored as it is."""
    if name in content:
        return None
    return Nf4Matrix(*(content[f"{name}{_MARK}{field}"] for field in FIELDS))
