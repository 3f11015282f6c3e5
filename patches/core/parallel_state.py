"""Patches of megatron.core.parallel_state: the end of its process groups."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from mindspeed_llm.patching import Patch


def _with_the_end_of_gloo_groups(original: Callable[[], None]) -> Callable[[], None]:
    from megatron.core import parallel_state

    @functools.wraps(original)
    def destroy_model_parallel() -> None:
        # torch refers to a group until it is ended.
        made = [weakref.ref(group) for group in parallel_state._global_process_group_list or () if _is_gloo(group)]
        original()
        # Two names it does not clear (0.16.1): _INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP and its gloo twin.
        names = vars(parallel_state)
        names.update(dict.fromkeys(name for name in names if any(names[name] is group() for group in made)))
        for group in made:
            if _is_gloo(group()):  # it has ended the gloo groups of data parallelism itself
                dist.destroy_process_group(group())
        # Threads end with the group, which lives while a model refers to it; models that nobody uses are cycles. To
        # look for those takes 0.2 s of a process that has megatron loaded, so only where a group is left.
        if any(group() is not None for group in made):
            gc.collect()

    return destroy_model_parallel


def _is_gloo(group: Any) -> bool:
    """Whether it is a group that torch still knows, and whose end needs nobody else."""
    known = group is not None and group in distributed_c10d._world.pg_map
    return known and dist.get_backend(group) == "gloo"


PATCHES = (
    Patch(
        name="gloo-groups-end",
        target="megatron.core.parallel_state:destroy_model_parallel",
        why="it forgets its groups without ending them, and the threads of each gloo group stay until the process ends",
        wrap=_with_the_end_of_gloo_groups,
        fingerprints={"0.15.3": "c55b16fa1e2b", "0.16.1": "ba045014b0a5"},
    ),
)
