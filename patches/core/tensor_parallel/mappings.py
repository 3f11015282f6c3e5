"""Patches of megatron.core.tensor_parallel.mappings."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_llm.patching import Patch


def _is_uneven(sizes: list[int] | None, group: dist.ProcessGroup) -> bool:
    return sizes is not None and len(set(sizes)) > 1 and dist.get_backend(group) == "gloo"


def _with_rows(x: Tensor, rows: int) -> Tensor:
    """x followed by as many zero rows as make `rows`."""
    return torch.cat([x, x.new_zeros(rows - x.shape[0], *x.shape[1:])])


def _gathers_uneven_rows(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def gather(input_: Tensor, group, output_split_sizes=None, use_global_buffer=False) -> Tensor:
        if not _is_uneven(output_split_sizes, group):
            return original(input_, group, output_split_sizes, use_global_buffer)
        largest = max(output_split_sizes)
        gathered = input_.new_empty(largest * group.size(), *input_.shape[1:])
        dist.all_gather_into_tensor(gathered, _with_rows(input_, largest), group=group)
        pieces = gathered.split(largest)
        return torch.cat([piece[:rows] for piece, rows in zip(pieces, output_split_sizes)])

    return gather


def _scatters_uneven_rows(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def reduce_scatter(input_: Tensor, group, input_split_sizes=None, use_global_buffer=False) -> Tensor:
        if not _is_uneven(input_split_sizes, group):
            return original(input_, group, input_split_sizes, use_global_buffer)
        largest = max(input_split_sizes)
        padded = torch.cat([_with_rows(piece, largest) for piece in input_.split(input_split_sizes)])
        own = input_.new_empty(largest, *input_.shape[1:])
        dist.reduce_scatter_tensor(own, padded, group=group)
        return own[: input_split_sizes[group.rank()]].contiguous()

    return reduce_scatter


WHY = (
    "tensor-parallel ranks of an expert get different numbers of tokens, and gloo refuses tensors of different sizes "
    "in one collective"
)
PATCHES = (
    Patch(
        name="uneven-gather-on-gloo",
        target="megatron.core.tensor_parallel.mappings:_gather_along_first_dim",
        why=WHY,
        wrap=_gathers_uneven_rows,
        fingerprints={"0.15.3": "abaaf454b5e0", "0.16.1": "abaaf454b5e0"},
    ),
    Patch(
        name="uneven-reduce-scatter-on-gloo",
        target="megatron.core.tensor_parallel.mappings:_reduce_scatter_along_first_dim",
        why=WHY,
        wrap=_scatters_uneven_rows,
        fingerprints={"0.15.3": "09ac89672936", "0.16.1": "09ac89672936"},
    ),
)
