"""Experts in a torch_dist checkpoint: one tensor [experts, out, in] per linear, whatever the layout.

The keys are those of megatron-core's SequentialMLP (`...mlp.experts.experts.linear_fc1.weight`), so experts stored one
by one and stacked experts read each other's checkpoints, at any expert and tensor parallel sizes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch import Tensor

STACKED = {"weight1": "linear_fc1.weight", "weight2": "linear_fc2.weight"}


def expert_sharded_state(
    experts: Any, prefix: str, offsets: tuple, parameters: Iterable[tuple[str, Tensor]] | None = None
) -> dict[str, Any]:
    """Local parameter name -> its place in the checkpoint.

    Args:
        experts: a `models.moe.experts.Experts`.
        prefix: of the local names, ending in "experts.".
        offsets: megatron's (axis, number, count) of dimensions that enclosing modules put in front.
        parameters: the experts' own, by name; default: all that they have.
    """
    ep, etp = experts.groups.ep, experts.groups.expt_tp
    total = experts.num_local_experts * ep.size()
    first = experts.num_local_experts * ep.rank()
    replica = (0, 0, experts.groups.expt_dp.rank())
    state = {}
    for name, parameter in experts.named_parameters() if parameters is None else parameters:
        if name in STACKED:
            linear, place, prepended = STACKED[name], (len(offsets), ep.rank(), ep.size()), len(offsets)
        else:
            _, index, linear = name.split(".", 2)
            place, prepended = (len(offsets), first + int(index), total), len(offsets) + 1
        shard = _Shard(linear.startswith("linear_fc1"), (*offsets, place), len(offsets) + 1, prepended, etp)
        key = f"{prefix}experts.{linear}"
        gated = shard.is_fc1 and experts.config.shape.gated_linear_unit
        state[prefix + name] = (
            ShardedTensorFactory(key, parameter, shard.gate_and_up, shard.joined, replica)
            if gated
            else shard.whole(key, parameter, replica)
        )
    return state


class _Shard:
    """Where the pieces of one parameter lie in the tensor [..., experts, out, in].

    Args:
        is_fc1: cut along `out`; otherwise along `in`.
        places: (axis, number, count) of the enclosing dimensions and of the experts.
        out_axis: of the checkpoint's tensor.
        prepended: dimensions of the checkpoint's tensor that the parameter itself does not have.
        tensor_parallel: the group that shares an expert.
    """

    def __init__(self, is_fc1: bool, places: tuple, out_axis: int, prepended: int, tensor_parallel: Any):
        self.is_fc1, self.places, self.out_axis, self.prepended = is_fc1, places, out_axis, prepended
        self.rank, self.size = tensor_parallel.rank(), tensor_parallel.size()

    def whole(self, key: str, tensor: Tensor, replica: tuple) -> ShardedTensor:
        """A parameter that is one piece."""
        axis = self.out_axis if self.is_fc1 else self.out_axis + 1
        return self._sharded(key, tensor, (axis, self.rank, self.size), replica)

    @torch.no_grad()
    def gate_and_up(
        self, key: str, tensor: Tensor, replica: tuple, flattened_range: slice | None
    ) -> list[ShardedTensor]:
        """The two halves of linear_fc1, each cut by itself, as megatron's MLP stores them."""
        halves = tensor.chunk(2, dim=self.out_axis - self.prepended)
        return [
            self._sharded(key, half, (self.out_axis, self.rank + number * self.size, 2 * self.size), replica)
            for number, half in enumerate(halves)
        ]

    @torch.no_grad()
    def joined(self, halves: list[Tensor]) -> Tensor:
        """The inverse of `gate_and_up`."""
        return torch.cat(halves, dim=self.out_axis - self.prepended)

    def _sharded(self, key: str, tensor: Tensor, cut: tuple, replica: tuple) -> ShardedTensor:
        return ShardedTensor.from_rank_offsets(
            key, tensor, *self.places, cut, replica_id=replica, prepend_axis_num=self.prepended
        )
