"""One view of every checkpoint format: unsharded megatron-core tensors by name, read slice by slice."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from mindspeed_llm.errors import UserError
from mindspeed_llm.models import layouts, packing
from mindspeed_llm.models.mapping import TensorPair, tensor_pairs, to_hf
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.ops.nf4_matrix import Nf4Matrix, quantize_matrix

COMPARE_BYTES = 64 * 2**20
"""How much of a tied pair of embeddings is compared at a time."""


class TensorSource(ABC):
    """The weights of one model, whatever file format and layout they are stored in.

    Names are mcore names with global layer indices; tensors are unsharded and unpadded. Opening a source checks that
    the files hold exactly the tensors of `shape`, with the right dimensions; reading touches only the bytes asked for.
    """

    def __init__(self, shape: ModelShape, origin: str) -> None:
        self.shape = shape
        self.origin = origin
        """What messages call the checkpoint, usually its path."""
        self.pairs: dict[str, TensorPair] = {pair.mcore: pair for pair in tensor_pairs(shape)}

    def names(self) -> tuple[str, ...]:
        """All mcore names, in model order."""
        return tuple(self.pairs)

    def dims(self, name: str) -> tuple[int, ...]:
        """Shape of the unsharded, unpadded tensor."""
        return self.pairs[name].dims

    @property
    def any_nf4(self) -> bool:
        """Whether some weight is stored in NF4."""
        return False

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Type the tensor is stored in."""

    @abstractmethod
    def read_part(self, name: str, part: int, start: int, stop: int) -> Tensor:
        """[start, stop) of one logical part of a tensor along the dimension that tensor parallelism cuts.

        Args:
            part: 0 for tensors of one part; 0, 1, 2 for q, k, v; 0, 1 for gate, up.
            start, stop: rows of that part (columns for row-parallel tensors); for q, k, v whole query groups.
        """

    def read_nf4(self, name: str, part: int, start: int, stop: int, device: torch.device | None = None) -> Nf4Matrix:
        """As `read_part` of a matrix, in NF4: a part of what the whole tensor of Hugging Face is quantised to.

        That is the logical part itself, or holds all of them; whoever quantises, 256 of its blocks share a scale.

        Args:
            device: where it is quantised; the result is there, or on the CPU if it was stored in NF4.

        Raises:
            UserError: blocks of 64 numbers do not fit into its rows, or are cut.
        """
        pair = self.pairs[name]
        if holds_parts(pair, self.shape):
            ((_, whole),) = to_hf(pair, self.read(name), self.shape)
            rows = rows_of_part(pair, self.shape, part)[start:stop]
            return quantize_matrix(whole.to(device or whole.device)).rows(rows.to(device or whole.device))
        whole = self.read_part(name, part, 0, part_sizes(pair, self.shape)[part])
        return quantize_matrix(whole.to(device or whole.device), pair.layout.tp_dim or 0, start, stop)

    def read(self, name: str) -> Tensor:
        """The whole tensor, unsharded and unpadded."""
        pair = self.pairs[name]
        sizes = part_sizes(pair, self.shape)
        parts = [self.read_part(name, i, 0, size) for i, size in enumerate(sizes)]
        return packing.pack(parts, pair.layout.packing, self.shape)

    def read_shard(self, name: str, rank: int, tp: int, padded_vocab: int | None = None) -> Tensor:
        """One tensor-parallel rank's tensor; only its bytes are read.

        Args:
            padded_vocab: rows of the padded vocabulary over all ranks; Megatron's default padding when not given.
        """
        pair = self.pairs[name]
        layout, sizes = pair.layout, part_sizes(pair, self.shape)
        if layout.tp_dim is None:
            return self.read(name)
        if layout.packing == "vocab":
            padded_vocab = padded_vocab or layouts.padded_vocab_size(self.shape.vocab_size, tp)
            start, stop, padding = layouts.vocab_range(self.shape.vocab_size, padded_vocab, rank, tp)
            return packing.with_zero_rows(self.read_part(name, 0, start, stop), padding)
        if not layout.expert:
            layouts.check_tensor_parallel(self.shape, tp)
        parts = [self.read_part(name, i, *layouts.shard_range(size, rank, tp)) for i, size in enumerate(sizes)]
        return packing.pack(parts, layout.packing, self.shape, tp)


def part_sizes(pair: TensorPair, shape: ModelShape) -> tuple[int, ...]:
    """Length of each logical part along the cut dimension."""
    return packing.part_rows(pair.layout.packing, shape) or (pair.dims[pair.layout.tp_dim or 0],)


def holds_parts(pair: TensorPair, shape: ModelShape) -> bool:
    """Whether one tensor of Hugging Face holds several logical parts (q, k, v; gate, up)."""
    return len(pair.hf) == 1 and len(part_sizes(pair, shape)) > 1


def rows_of_part(pair: TensorPair, shape: ModelShape, part: int) -> Tensor:
    """Of one tensor of Hugging Face that `holds_parts`, the rows of one of them."""
    sizes = part_sizes(pair, shape)
    numbers = torch.arange(sum(sizes))
    if pair.transform == "concatenated":
        return numbers.split(sizes)[part]
    return packing.unpack(numbers, pair.layout.packing, shape)[part]


def packed_range(pair: TensorPair, shape: ModelShape, part: int, start: int, stop: int) -> tuple[int, int, int]:
    """Where a range of a logical part lies in the unsharded mcore tensor.

    Returns:
        (first row, last row + 1, number of query groups in between): for q, k, v the rows of all the groups concerned,
        to be unpacked by the reader; the third number is 0 for every other tensor, whose rows are the wanted ones.
    """
    sizes = part_sizes(pair, shape)
    if pair.layout.packing != "qkv":
        offset = sum(sizes[:part])
        return offset + start, offset + stop, 0
    per_group = sizes[part] // shape.num_query_groups
    assert start % per_group == 0 and stop % per_group == 0, "q, k, v are cut between query groups"
    rows = sum(sizes) // shape.num_query_groups
    return start // per_group * rows, stop // per_group * rows, (stop - start) // per_group


def unpack_groups(block: Tensor, shape: ModelShape, groups: int, part: int) -> Tensor:
    """q, k or v of a block of whole query groups [groups * (n/g + 2) * d, ...]."""
    heads = groups * (shape.num_attention_heads // shape.num_query_groups)
    return packing.unpack_qkv(block, heads, groups, shape.kv_channels)[part]


def check_names(expected: Sequence[str], found: Sequence[str], origin: str, why: str = "") -> None:
    """Refuse a checkpoint that lacks tensors or has others.

    Raises:
        UserError: names the first few of them.
    """
    missing, unexpected = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    problems = [
        f"{len(names)} {what} ({_few(names)})"
        for what, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    if problems:
        raise UserError(
            f"checkpoint: {origin} does not hold this model: {'; '.join(problems)} of {len(expected)} tensors"
            + (f"; {why}" if why else "")
        )


def check_dims(name: str, expected: Sequence[int], found: Sequence[int], origin: str) -> None:
    """Refuse a tensor of the wrong shape."""
    if tuple(expected) != tuple(found):
        raise UserError(
            f"checkpoint: {name} in {origin} has shape {list(found)}, because it belongs to another model; legal: "
            f"{list(expected)}"
        )


def check_one_dtype(name: str, dtypes: Sequence[torch.dtype], origin: str) -> None:
    """Refuse a tensor whose parts are stored in different types: joining them would round some of them."""
    if len(set(dtypes)) > 1:
        found = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise UserError(f"checkpoint: the parts of {name} in {origin} have types {found}; legal: one type")


TIED = "tie_word_embeddings is true; try: set tie_word_embeddings to false in config.json if they are meant to"


def check_equal(first: Tensor, second: Tensor, what: str, why: str) -> None:
    """Refuse two copies that differ, comparing a bounded number of rows at a time.

    Raises:
        UserError: they are not bitwise equal.
    """
    step = max(1, COMPARE_BYTES // max(1, first[0].numel() * first.element_size()))
    for start in range(0, first.shape[0], step):
        if not torch.equal(first[start : start + step], second[start : start + step]):
            raise UserError(f"checkpoint: {what} differ although {why}")


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
