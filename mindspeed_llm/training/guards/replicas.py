"""Copies of weights and optimizer state that must be equal to the bit, compared over the ranks that hold them.

A rank whose memory or links flip a bit goes on training another model than its peers, and nothing else notices.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mindspeed_llm import accelerator
from mindspeed_llm.checkpoint.names import EMBEDDING, OUTPUT_LAYER
from mindspeed_llm.checkpoint.optimizer_state import MOMENTS, own_states
from mindspeed_llm.errors import UserError
from mindspeed_llm.parallel.shards import shard_of
from mindspeed_llm.plan.plan import Plan
from mindspeed_llm.training.guards.bits import hash_all
from mindspeed_llm.training.setup import TrainingModel, gather_parameters, placement

SHOWN = 3


@dataclass(frozen=True)
class Copy:
    """A tensor that other ranks hold too.

    Attributes:
        kind: which ranks do: "dense" (all replicas of the data), "replicated" (the tensor-parallel ranks too), "expert"
            (replicas of the same experts), "whole in expert" (the ranks that share an expert too), "shard" (the
            tensor-parallel ranks alone), or "tied" (the first and the last stage).
    """

    name: str
    kind: str
    tensor: Tensor


def check_replicas(
    plan: Plan, model: TrainingModel, optimizer: Any, iteration: int, *, trained_only: bool = False
) -> None:
    """Compare the copies; collective, one small reduction for each kind of copy while all agree.

    Args:
        trained_only: pass over what is frozen: of a LoRA run the adapters are left.

    Raises:
        UserError: some differ; on all ranks.
    """
    gather_parameters(model)
    copies = sorted(_copies(plan, model, optimizer, trained_only), key=lambda copy: copy.kind)
    device = accelerator.current().current_device()
    hashes = hash_all([copy.tensor for copy in copies], device)
    differs = torch.zeros(1, dtype=torch.int64, device=device)
    for kind, groups in _groups(plan).items():
        own = hashes[[i for i, copy in enumerate(copies) if copy.kind == kind]]
        extremes = torch.cat([own, -own - 1])  # the second's largest is the smallest of the first
        for group in groups:
            dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group)
        largest, smallest = extremes[: own.numel()], -extremes[own.numel() :] - 1
        differs += (largest != smallest).sum()
    dist.all_reduce(differs)
    if int(differs):
        raise UserError(_describe(_holders(plan), copies, hashes.tolist(), iteration))


def _groups(plan: Plan) -> dict[str, list[Any]]:
    """For each kind of copy that this rank has the groups whose product holds it."""
    from megatron.core import parallel_state

    replicas = parallel_state.get_expert_data_parallel_group()
    groups = {
        "dense": [parallel_state.get_data_parallel_group(with_context_parallel=True)],
        "replicated": [parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)],
        "expert": [replicas],
        "shard": [parallel_state.get_tensor_model_parallel_group()],
        "whole in expert": [parallel_state.get_expert_tensor_parallel_group(), replicas],
    }
    tied = plan.shape.tie_word_embeddings and plan.pipeline_parallel_size > 1
    if tied and parallel_state.is_rank_in_embedding_group():
        groups["tied"] = [parallel_state.get_embedding_group()]
    return groups


def _holders(plan: Plan) -> dict[str, tuple[int, ...]]:
    """For each kind of copy the ranks that hold it with this one."""
    holders = {kind: tuple(dist.get_process_group_ranks(found[-1])) for kind, found in _groups(plan).items()}
    here = plan.layout.coordinates(dist.get_rank())
    others = ((rank, plan.layout.coordinates(rank)) for rank in range(dist.get_world_size()))
    holders["whole in expert"] = tuple(rank for rank, there in others if (there.pp, there.ep) == (here.pp, here.ep))
    return holders


def _copies(plan: Plan, model: TrainingModel, optimizer: Any, trained_only: bool) -> Iterator[Copy]:
    names: dict[nn.Parameter, str] = {}
    for number, chunk in enumerate(model.chunks):
        here = placement(plan, number)
        for local, parameter in chunk.named_parameters():
            names[parameter] = here.global_name(local)
            if trained_only and not parameter.requires_grad:
                continue
            kind, shard = _kind(parameter), shard_of(parameter)
            if shard is not None:  # of what is cut over the replicas only tensor-parallel ranks have copies
                if kind in ("replicated", "whole in expert"):
                    yield Copy(names[parameter], "shard", shard.main)
                continue
            yield Copy(names[parameter], kind, parameter)
            if local in (EMBEDDING, OUTPUT_LAYER) and "tied" in _groups(plan):
                yield Copy(EMBEDDING, "tied", parameter)
    for state in own_states(optimizer):
        if not state.is_slice and state.main is not None and MOMENTS[0] in state.part.optimizer.state[state.main]:
            for what, tensor in state.values().items():
                yield Copy(f"{names[state.parameter]} ({what})", _kind(state.parameter), tensor)


def _kind(parameter: nn.Parameter) -> str:
    if not getattr(parameter, "allreduce", True):
        return "whole in expert" if getattr(parameter, "whole_in_expert", False) else "expert"
    return "dense" if getattr(parameter, "tensor_model_parallel", False) else "replicated"


def _describe(holders: dict[str, tuple[int, ...]], copies: list[Copy], hashes: list[int], iteration: int) -> str:
    """The line that names tensors and ranks: those that differ from most of their peers."""
    mine = (socket.gethostname(), {(c.name, holders[c.kind]): value for c, value in zip(copies, hashes, strict=True)})
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, mine)
    hosts = [host for host, _ in everybody]
    table: dict[tuple[str, tuple[int, ...]], dict[int, int]] = {}
    for rank, (_, found) in enumerate(everybody):
        for key, value in found.items():
            table.setdefault(key, {})[rank] = value
    lines = [
        f"{name} {_odd_ranks(values, hosts)}" for (name, _), values in table.items() if len(set(values.values())) > 1
    ]
    more = f" and {len(lines) - SHOWN} more tensors" if len(lines) > SHOWN else ""
    return (
        f"replicas: copies differ after iteration {iteration}, because a device or a link changed bits: "
        f"{'; '.join(lines[:SHOWN])}{more}; legal: equal copies; try: resume from the last checkpoint without that host"
    )


def _odd_ranks(values: dict[int, int], hosts: list[str]) -> str:
    """Who differs from the majority; without one, who has what cannot be said."""
    (common, count), *_ = Counter(values.values()).most_common()
    if count * 2 <= len(values):
        ranks = ", ".join(f"{rank} on {hosts[rank]}" for rank in values)
        return f"differs between ranks {ranks} (no majority says which is wrong)"
    odd = [rank for rank, value in values.items() if value != common]
    return f"on rank {', '.join(f'{r} ({hosts[r]})' for r in odd)} differs from the {count} other copies"
