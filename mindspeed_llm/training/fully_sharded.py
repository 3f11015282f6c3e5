"""`--use-torch-fsdp2`: the model cut over the data-parallel ranks, megatron-core's optimizer over what is held here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer.optimizer import FP32Optimizer
from torch import nn

from mindspeed_llm.parallel.fsdp2 import FullySharded
from mindspeed_llm.parallel.shards import Shard, shard_of


def fully_sharded(chunk: nn.Module, *, reshard_after_forward: bool) -> FullySharded:
    """A built model with its weights and adapters, cut over the ranks that see other tokens.

    Layers are gathered one at a time, and so is an embedding that is not the output layer's weight as well; final norm
    and output layer, whose weight the loss takes without calling it, are gathered for the whole pass.
    """
    from mindspeed_llm.checkpoint.training_state import sharded_model_state

    # Names, shapes and places of the whole tensors; what a checkpoint takes is the shards.
    state = sharded_model_state([chunk])["model0"]
    names = [name for name, _ in chunk.named_parameters()]
    for name in names:
        state[name].data = None  # whole values are let go one by one
    units = [*chunk.decoder.layers]
    if getattr(chunk, "mtp", None) is not None:
        units += chunk.mtp.layers
    if not chunk.share_embeddings_and_output_weights:
        units.append(chunk.embedding.word_embeddings)
    units = [unit for unit in units if any(True for _ in unit.parameters())]
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    wrapped = FullySharded(chunk, group, units, reshard_after_forward)
    for name in names:
        state[name].data = wrapped.shards[name].parameter
    for name, buffer in chunk.named_buffers():
        if name in state:  # on the device now
            state[name].data = buffer
    chunk.lasting_sharded_state = state
    chunk.config.finalize_model_grads_func = finalize_model_grads
    return wrapped


class ShardedOptimizer(FP32Optimizer):
    """megatron-core's fp32 optimizer, over the values that this rank holds of each parameter.

    Attributes:
        shards: of its parameters, those of which nothing is held here included.
    """

    shards: list[Shard]

    @classmethod
    def take_over(cls, part: FP32Optimizer) -> None:
        """Let an optimizer over cut parameters update what is held here."""
        part.__class__ = cls
        part.shards = [shard_of(p) for group in part.param_groups for p in group["params"]]
        for group in part.param_groups:
            held = [shard_of(p) for p in group["params"]]
            group["params"] = [shard.main for shard in held if shard.main.numel()]
        # Every element of a gradient is on one rank; copies of tensor-parallel ranks are left out by their marks.
        part.grad_stats_parallel_group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)

    @torch.no_grad()
    def prepare_grads(self) -> bool:
        """Take the reduced gradients of the backward pass; finds no overflow, since nothing is scaled."""
        for shard in self.shards:
            shard.main.grad = shard.gradient
        return False


def shard_optimizer(parts: Sequence[Any]) -> None:
    """`ShardedOptimizer.take_over` of each optimizer."""
    for part in parts:
        ShardedOptimizer.take_over(part)
