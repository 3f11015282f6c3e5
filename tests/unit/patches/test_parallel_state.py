"""megatron-core's process groups end with its parallel state."""

import os

import pytest
import torch.distributed as dist
from torch.distributed import distributed_c10d

from mindspeed_llm.testing.pool import pool

NAME, TIMES = "gloo-groups-end", 3


def threads_and_groups(patched):
    """Threads of this process and groups known to torch after each of some parallel states, less those before."""
    from megatron.core import parallel_state

    from mindspeed_llm import patches, patching
    from mindspeed_llm.parallel.setup import release_groups

    def count():
        return len(os.listdir("/proc/self/task")), len(distributed_c10d._world.pg_map)

    patches.apply()
    release_groups()
    if not patched:
        patching.undo([NAME])
    threads, known = count()
    counts = []
    try:
        for _ in range(TIMES):
            parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
            dist.barrier(parallel_state.get_tensor_model_parallel_group())
            parallel_state.destroy_model_parallel()
            counts.append(count())
    finally:
        patches.apply()
        for group in list(distributed_c10d._world.pg_map):
            if group is not dist.group.WORLD:
                dist.destroy_process_group(group)
        release_groups()
    return [(now - threads, groups - known) for now, groups in counts]


@pytest.mark.parametrize("ranks", [1, 2])
def test_groups_and_their_threads_end(ranks):
    for counts in pool(ranks).run(threads_and_groups, True):
        assert [groups for _, groups in counts] == [0] * TIMES
        assert counts[-1][0] <= counts[0][0]


def test_without_the_patch_they_pile_up():
    ((first, *_, last),) = pool(1).run(threads_and_groups, False)
    assert last[0] >= 2 * first[0] > 0 and last[1] == TIMES * first[1] > 0


def test_groups_of_the_program_stay():
    assert pool(1).run(own_group_after_the_end) == [2.0]


def own_group_after_the_end():
    """A sum over a group that the program made itself."""
    import torch
    from megatron.core import parallel_state

    from mindspeed_llm import patches
    from mindspeed_llm.parallel.setup import release_groups

    patches.apply()
    release_groups()
    own = dist.new_group([0])
    parallel_state.initialize_model_parallel()
    parallel_state.destroy_model_parallel()
    value = torch.tensor(2.0)
    dist.all_reduce(value, group=own)
    dist.destroy_process_group(own)
    return float(value)
