"""Boxes: which rectangular part of which global tensor a rank holds, without a copy.

A checkpoint is a set of global tensors, each put together from boxes that may be of any size. What a rank holds is
described as boxes on its own memory, so it writes what it has and reads what it wants, and nobody gathers anything. A
slice of a flattened tensor, which is what a distributed optimizer holds, is a few boxes: the rest of the first row,
whole rows, the beginning of the last, and so on inward.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Box:
    """A part of a global tensor that this rank holds.

    Attributes:
        key: the global tensor's name in the checkpoint.
        global_shape: of the global tensor.
        offsets: of this part, one for each dimension.
        tensor: the values, of as many dimensions; a view of the memory they live in.
        replica_id: megatron-core's: 0s alone for the main one where several ranks hold the same; the last number counts
            data-parallel ranks.
        replicas: data-parallel ranks that hold the same.
        flexible: the stored tensor may be longer or shorter (a padded vocabulary); the rest reads as zeros.
    """

    key: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    tensor: Tensor
    replica_id: int | tuple[int, ...] = 0
    replicas: int = 1
    flexible: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of this part."""
        return tuple(self.tensor.shape)

    @property
    def nbytes(self) -> int:
        """Of its values."""
        return self.tensor.numel() * self.tensor.element_size()

    @property
    def place(self) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
        """Key, offsets and shape: equal for boxes with the same values."""
        return self.key, self.offsets, self.shape

    def is_main(self) -> bool:
        """Whether this is the first replica."""
        ids = (self.replica_id,) if isinstance(self.replica_id, int) else self.replica_id
        return not any(ids)


def sharded_leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, ShardedTensor or factory) for the tensors in nested dicts of megatron-core's sharded state."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from sharded_leaves(value, f"{prefix}{name}.")
        elif hasattr(value, "replica_id") and isinstance(getattr(value, "data", None), Tensor):
            yield prefix + name, value


def own_share(boxes: Iterable[Box]) -> list[Box]:
    """The boxes that this rank writes when all ranks are there: data-parallel ranks share what they all hold.

    All of them see the same boxes with the same sizes, so each finds the same shares without asking: the largest box
    first, to the one with the least so far.
    """
    own, shared = [], []
    for box in boxes:
        if box.replicas == 1:
            own += [box] if box.is_main() else []
        elif not any(box.replica_id[:-1]):
            shared.append(box)
    loads = {count: [0] * count for count in {box.replicas for box in shared}}
    for box in sorted(shared, key=lambda box: (-box.nbytes, box.place)):
        load = loads[box.replicas]
        writer = load.index(min(load))
        load[writer] += box.nbytes
        if writer == box.replica_id[-1]:
            own.append(box)
    return own


def tensor_boxes(sharded: Any, replicas: int = 1) -> list[Box]:
    """The boxes of a ShardedTensor, or of a factory (two for a gated fc1), as views of its data.

    Args:
        replicas: data-parallel ranks that hold the same.
    """
    boxes = [_box(piece, piece.data.detach(), replicas) for piece in _pieces(sharded)]
    whole = sharded.data.untyped_storage().data_ptr()
    assert all(box.tensor.untyped_storage().data_ptr() == whole for box in boxes), f"{sharded.key} is stored as a copy"
    return boxes


def slice_boxes(sharded: Any, key: str, held: Tensor, start: int, stop: int, replicas: int | None) -> list[Box]:
    """The boxes of a slice of a flattened tensor.

    Args:
        sharded: where the whole tensor belongs: megatron-core's description of a contiguous parameter.
        key: name of the global tensor that the slice is part of, in place of the parameter's.
        held: the values of [start, stop) of the flattened tensor, contiguous, of any type.
        replicas: data-parallel ranks that hold the same slice; None where each holds another, whatever the
            parameter's replicas.
    """
    assert held.is_contiguous() and held.numel() == stop - start, (sharded.key, held.shape, start, stop)
    flat, replica = held.detach().view(-1), sharded.replica_id
    if replicas is None and not isinstance(replica, int):
        replica = (*replica[:-1], 0)
    outline = torch.empty(sharded.data.shape, dtype=held.dtype, device="meta")
    boxes = []
    for piece in _pieces(_with_data(sharded, outline)):
        layout = piece.data
        assert layout is outline or layout._base is outline, f"{sharded.key} is stored as a copy"
        # megatron-core leaves the dimensions it prepends out of the data; they have one element here
        lead = len(piece.global_offset) - layout.dim()
        for offsets, shape, first in cut(layout.shape, layout.stride(), layout.storage_offset(), start, stop):
            begin = flat.storage_offset() + first - start
            view = flat.as_strided((1,) * lead + shape, (1,) * lead + layout.stride(), begin)
            at = tuple(a + b for a, b in zip(piece.global_offset, (0,) * lead + offsets))
            boxes.append(replace(_box(piece, view, replicas or 1), key=key, offsets=at, replica_id=replica))
    return boxes


def cut(
    shape: tuple[int, ...], strides: tuple[int, ...], origin: int, start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """Cut the elements of a strided array that lie in [start, stop) of its memory into boxes.

    Args:
        shape, strides: of the array; strides fall from the first dimension to the last, rows do not interleave.
        origin: place of its first element in memory.

    Yields:
        (offsets, shape, place of the first element in memory), at most 2 n - 1 for n dimensions.
    """
    extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides))
    if 0 in shape or start >= origin + extent or stop <= origin:
        return
    if start <= origin and stop >= origin + extent:
        yield (0,) * len(shape), tuple(shape), origin
        return
    row, step = 1 + sum((size - 1) * stride for size, stride in zip(shape[1:], strides[1:])), strides[0]
    lowest, highest = max(0, (start - origin) // step), min(shape[0], -((origin - stop) // step))
    first = max(lowest, -((origin - start) // step))  # rows that begin inside
    last = max(first, min(highest, (stop - origin - row) // step + 1))  # and those that end there too
    for index in range(lowest, first):
        yield from _in_row(shape, strides, origin, index, start, stop)
    if first < last:
        yield (first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:]), origin + first * step
    for index in range(last, highest):
        yield from _in_row(shape, strides, origin, index, start, stop)


def _in_row(
    shape: tuple[int, ...], strides: tuple[int, ...], origin: int, index: int, start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    for offsets, inner, place in cut(shape[1:], strides[1:], origin + index * strides[0], start, stop):
        yield (index, *offsets), (1, *inner), place


def split_boxes(box: Box, max_bytes: int) -> Iterator[Box]:
    """The same values as boxes of at most `max_bytes` each, cut along the first dimension that is longer than one."""
    if box.nbytes <= max_bytes:
        yield box
        return
    axis = next(axis for axis, size in enumerate(box.shape) if size > 1)
    step = max(1, box.shape[axis] * max_bytes // box.nbytes)
    for begin in range(0, box.shape[axis], step):
        length = min(step, box.shape[axis] - begin)
        offsets = tuple(at + (begin if a == axis else 0) for a, at in enumerate(box.offsets))
        yield from split_boxes(replace(box, offsets=offsets, tensor=box.tensor.narrow(axis, begin, length)), max_bytes)


def not_a_partition(global_shape: tuple[int, ...], boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> str | None:
    """What is wrong with boxes that should cover a tensor exactly once; None when they do.

    Args:
        boxes: (offsets, shape) of each.
    """
    for offsets, shape in boxes:
        if len(offsets) != len(global_shape) or any(
            at < 0 or at + size > whole for at, size, whole in zip(offsets, shape, global_shape)
        ):
            return f"the box {list(shape)} at {list(offsets)} leaves the tensor {list(global_shape)}"
    covered, wanted = sum(math.prod(shape) for _, shape in boxes), math.prod(global_shape)
    if covered < wanted:
        return f"{wanted - covered} of {wanted} values are missing"
    return _overlap([box for box in boxes if math.prod(box[1])]) if global_shape else None


def _overlap(boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> str | None:
    """Two boxes that share a value, found by a sweep along the dimension with the most boundaries."""
    if len(boxes) < 2:
        return None
    dims = range(len(boxes[0][0]))
    axis = max(dims, key=lambda d: len({offsets[d] for offsets, _ in boxes}))
    open_boxes: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    for offsets, shape in sorted(boxes, key=lambda box: box[0][axis]):
        open_boxes = [(at, size) for at, size in open_boxes if at[axis] + size[axis] > offsets[axis]]
        for at, size in open_boxes:
            if all(max(offsets[d], at[d]) < min(offsets[d] + shape[d], at[d] + size[d]) for d in dims):
                return f"the boxes {list(shape)} at {list(offsets)} and {list(size)} at {list(at)} overlap"
        open_boxes.append((offsets, shape))
    return None


def _pieces(sharded: Any) -> list[Any]:
    """The ShardedTensors that a factory makes, or the one that it is."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    return list(nested_values({"built": sharded.build()})) if hasattr(sharded, "build") else [sharded]


def _with_data(sharded: Any, data: Tensor) -> Any:
    """The same description of other values of the same shape."""
    return replace(sharded, data=data, **({"dtype": data.dtype} if hasattr(sharded, "dtype") else {}))


def _box(piece: Any, values: Tensor, replicas: int) -> Box:
    lead = len(piece.global_offset) - values.dim()
    return Box(
        piece.key,
        tuple(int(size) for size in piece.global_shape),
        tuple(int(at) for at in piece.global_offset),
        values[(None,) * lead] if lead > 0 else values,
        piece.replica_id,
        1 if isinstance(piece.replica_id, int) else replicas,
        piece.allow_shape_mismatch,
    )
