"""Norms of gradients and weights by layer, and zeros among gradients; the same for every layout.

Every element is counted on exactly one rank: tensor-parallel copies by the first rank, replicas by the first of them,
a distributed optimizer's slices by their owners, the second copy of tied embeddings by nobody.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from mindspeed_llm import accelerator
from mindspeed_llm.parallel.exact_sum import sum_float64
from mindspeed_llm.parallel.shards import shard_of, shards_of
from mindspeed_llm.training.log_line import PARAMS_NORM, ZEROS_IN_GRADIENT
from mindspeed_llm.training.monitor.places import PlacedChunk

GRADIENT_OF, WEIGHTS_OF = "grad-norm/", "params-norm/"


@dataclass(frozen=True)
class Part:
    """A parameter of this rank, counted here.

    Attributes:
        place: number of the part of the model that it belongs to.
        gradient: reduced, what of it this rank has to count; empty when another rank does, None of a frozen one.
        weight: likewise; None when another rank counts it.
    """

    place: int
    gradient: torch.Tensor | None
    weight: torch.Tensor | None


def parts(chunk: PlacedChunk) -> Iterator[Part]:
    """What this rank counts of one chunk's parameters."""
    if shards_of(chunk.wrapped):
        yield from _shards(chunk)
        return
    sharded = chunk.wrapped.ddp_config.use_distributed_optimizer
    gradients = {
        parameter: _own_slice(buffer, parameter, sharded)
        for buffer in (*chunk.wrapped.buffers, *chunk.wrapped.expert_parallel_buffers)
        for parameter in buffer.param_index_map
    }
    for place, parameter in chunk.parameters():
        if is_counted(parameter):
            weight = parameter.detach() if _replica(parameter) == 0 else None
            yield Part(place, gradients.get(parameter), weight)


def _shards(chunk: PlacedChunk) -> Iterator[Part]:
    """What this rank holds of parameters that are cut: nobody else holds it, tensor-parallel copies apart."""
    for place, parameter in chunk.parameters():
        if is_counted(parameter):
            shard = shard_of(parameter)
            yield Part(place, shard.gradient, shard.main.detach())


def is_counted(parameter: torch.nn.Parameter) -> bool:
    """Whether this rank's (part of a) tensor is not another rank's too, replicas aside."""
    group = parallel_state.get_tensor_model_parallel_group()
    if _is_expert(parameter):
        group = parallel_state.get_expert_tensor_parallel_group()
    return param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter, group)


def _is_expert(parameter: torch.nn.Parameter) -> bool:
    return not getattr(parameter, "allreduce", True)


def _replica(parameter: torch.nn.Parameter) -> int:
    if _is_expert(parameter):
        return parallel_state.get_expert_data_parallel_rank()
    return parallel_state.get_data_parallel_rank(with_context_parallel=True)


def _own_slice(buffer: Any, parameter: torch.nn.Parameter, sharded: bool) -> torch.Tensor:
    """The reduced gradient that this rank counts: a slice of its own, or all of it on the first replica."""
    start, end, bucket_id = buffer.param_index_map[parameter]
    group = buffer.data_parallel_group
    if sharded:
        bucket = buffer.buckets[bucket_id]
        size = bucket.grad_data.numel() // group.size()
        first = bucket.offset + group.rank() * size
        start, end = max(start, first), min(end, first + size)
    elif group.rank() != 0:
        end = start
    return buffer.grad_data[start : max(start, end)]


class LayerNorms:
    """Norms of every part of a model.

    Args:
        chunks: of this rank.
        names: of the parts, by number.
    """

    def __init__(self, chunks: Sequence[PlacedChunk], names: Sequence[str]) -> None:
        self.chunks, self.names = chunks, names

    def measure(self, loss_scale: float) -> dict[str, float]:
        """Norms of the reduced gradients and of the weights they belong to, by name; a collective call.

        Args:
            loss_scale: that the gradients are multiplied by.
        """
        device = accelerator.current().current_device()
        sums = torch.zeros(3, len(self.names), dtype=torch.float64, device=device)
        for chunk in self.chunks:
            for part in parts(chunk):
                if part.gradient is not None:
                    sums[0, part.place] += square_sum(part.gradient)
                    sums[2, part.place] += (part.gradient == 0).sum()
                if part.weight is not None:
                    sums[1, part.place] += square_sum(part.weight)
        sum_float64(sums)
        gradients, weights, zeros = sums.tolist()
        return {
            PARAMS_NORM: math.sqrt(sum(weights)),
            ZEROS_IN_GRADIENT: sum(zeros),
            **{f"{GRADIENT_OF}{n}": math.sqrt(x) / loss_scale for n, x in zip(self.names, gradients)},
            **{f"{WEIGHTS_OF}{n}": math.sqrt(x) for n, x in zip(self.names, weights)},
        }


def square_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum of squares in double precision, whatever the type."""
    norm = torch.linalg.vector_norm(values, dtype=torch.float32 if values.dtype != torch.float64 else None)
    return norm.double().square()
