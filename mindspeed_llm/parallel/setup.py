"""Start and end of the process groups: torch.distributed, megatron's parallel state and its random streams."""

from __future__ import annotations

import datetime
import gc
import os
import socket
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from mindspeed_llm import accelerator
from mindspeed_llm.accelerator import torch_facade
from mindspeed_llm.errors import UserError
from mindspeed_llm.parallel.attempt import store_of_attempt

# Before megatron is loaded, which the functions below do.
torch_facade.install(accelerator.current())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def initialize_process_group(timeout_minutes: float = 10.0) -> None:
    """Join the process group described by torchrun's environment, or be a world of one without it. Twice is once."""
    if dist.is_initialized():
        return
    device = accelerator.current()
    if device.device_count() > 1:
        device.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    timeout = datetime.timedelta(minutes=timeout_minutes)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True):
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        store = store_of_attempt(store, rank, world_size, timeout.total_seconds())
        dist.init_process_group(
            device.distributed_backend, store=store, rank=rank, world_size=world_size, timeout=timeout
        )
        return
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(device.distributed_backend, timeout=timeout)
        return
    address = f"tcp://127.0.0.1:{_free_port()}"
    dist.init_process_group(device.distributed_backend, init_method=address, world_size=1, rank=0, timeout=timeout)


def initialize_distributed(
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    virtual_pipeline_parallel_size: int | None = None,
    context_parallel_size: int = 1,
    expert_parallel_size: int = 1,
    expert_tensor_parallel_size: int | None = None,
    ulysses_size: int = 1,
    seed: int = 1234,
    timeout_minutes: float = 10.0,
) -> None:
    """Process group, megatron's parallel state for these sizes, and the random streams for `seed`.

    Calling it again replaces the parallel state of an earlier call. `ulysses_size` is of the groups whose ranks
    exchange heads, see `context_split`.

    Raises:
        UserError: the world size is not a multiple of tensor x pipeline x context parallel size.
    """
    from megatron.core import parallel_state

    initialize_process_group(timeout_minutes)
    model_parallel = tensor_parallel_size * pipeline_parallel_size * context_parallel_size
    if dist.get_world_size() % model_parallel:
        raise UserError(
            f"world size: {dist.get_world_size()} is wrong, because it is not a multiple of tensor x pipeline x "
            f"context parallel size = {tensor_parallel_size} x {pipeline_parallel_size} x {context_parallel_size}; "
            f"legal: multiples of {model_parallel}"
        )
    sizes = (
        tensor_parallel_size,
        pipeline_parallel_size,
        virtual_pipeline_parallel_size,
        context_parallel_size,
        expert_parallel_size,
        expert_tensor_parallel_size,
        ulysses_size,
    )
    if not (parallel_state.is_initialized() and _made.sizes == sizes and _made.world is dist.group.WORLD):
        _replace_groups(sizes, timeout_minutes)
    set_random_streams(seed)


class _Made:
    """The process groups of the last parallel state made here, and what they were made for."""

    sizes: tuple | None = None
    world: Any = None
    groups: list[Any] = []
    head_exchange: Any = None


_made = _Made()


def release_groups() -> None:
    """End megatron's parallel state and its groups, but stay in the process group.

    megatron forgets its groups without ending them (the patch `gloo-groups-end` ends its gloo ones; here go all that
    were made, ours and those of other back ends too), and each gloo group keeps threads that wake up all the time: a
    process that makes many parallel states, as a test session does, would end up doing little else. A group lives on
    while a model refers to it, and models that are not used any more are cycles of references: hence the collection.
    """
    from megatron.core import parallel_state

    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    if _made.world is dist.group.WORLD:
        for group in _made.groups:
            if group in distributed_c10d._world.pg_map:  # megatron ends some of them itself
                dist.destroy_process_group(group)
    _made.sizes, _made.world, _made.groups, _made.head_exchange = None, None, [], None
    gc.collect()


def _replace_groups(sizes: tuple, timeout_minutes: float) -> None:
    """megatron's parallel state for these sizes, in place of an earlier one."""
    from megatron.core import parallel_state

    release_groups()
    before = set(distributed_c10d._world.pg_map)
    tensor_size, pipeline_size, virtual_stages, context_size, expert_size, expert_tensor_size, ulysses_size = sizes
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_size,
        pipeline_model_parallel_size=pipeline_size,
        virtual_pipeline_model_parallel_size=virtual_stages,
        context_parallel_size=context_size,
        expert_model_parallel_size=expert_size,
        expert_tensor_parallel_size=expert_tensor_size,
        distributed_timeout_minutes=timeout_minutes,
    )
    _made.head_exchange = _new_head_exchange(tensor_size, context_size, ulysses_size)
    _made.sizes, _made.world = sizes, dist.group.WORLD
    _made.groups = [group for group in distributed_c10d._world.pg_map if group not in before]


def _new_head_exchange(tensor_size: int, context_size: int, ulysses_size: int) -> Any:
    """This rank's group of neighbours in its context-parallel group, None where there is none."""
    from megatron.core import parallel_state

    if ulysses_size == 1:
        return None
    if ulysses_size == context_size:
        return parallel_state.get_context_parallel_group()
    # Context-parallel ranks are tensor_size apart, see parallel.layout.
    blocks = range(0, dist.get_world_size(), tensor_size * ulysses_size)
    ranks = [
        list(range(block + tp, block + tensor_size * ulysses_size, tensor_size))
        for block in blocks
        for tp in range(tensor_size)
    ]
    return dist.new_subgroups_by_enumeration(ranks)[0]


def head_exchange_group(ulysses_size: int) -> Any:
    """The context-parallel ranks that exchange heads with this one, None for `ulysses_size` 1.

    Raises:
        ValueError: `initialize_distributed` was called with another size.
    """
    if ulysses_size == 1:
        return None
    if _made.head_exchange is None or _made.head_exchange.size() != ulysses_size:
        raise ValueError(f"initialize_distributed was not called with ulysses_size={ulysses_size}")
    return _made.head_exchange


def set_random_streams(seed: int) -> None:
    """Seed torch's default stream and megatron's tracked ones (a stream per tensor-parallel rank, and a shared one)."""
    from megatron.core import parallel_state, tensor_parallel

    # Pipeline stages and shares of a sequence draw different dropout masks; tensor-parallel ranks of a stage share the
    # default stream. The offsets keep the streams apart for up to 10,000 stages.
    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    stage_seed += 1_000_000 * parallel_state.get_context_parallel_rank()
    torch.manual_seed(stage_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(stage_seed, force_reset_rng=True)


def destroy_distributed() -> None:
    """Leave the parallel state and the process group."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    _made.sizes, _made.world, _made.groups, _made.head_exchange = None, None, [], None
    if dist.is_initialized():
        dist.destroy_process_group()
