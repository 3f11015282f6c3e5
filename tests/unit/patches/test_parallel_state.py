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


@pytest.mark.parametrize("search", [True, False])
def test_a_model_that_nobody_uses_keeps_no_threads(search):
    """Such a model is a cycle; with nobody looking for cycles its group, and the threads of it, stay."""
    ((threads, searches),) = pool(1).run(threads_of_a_lost_model, search)
    assert searches == 1 and (threads == 0) == search


def test_cycles_are_looked_for_only_where_a_group_is_left():
    assert pool(1).run(searches_without_a_model) == [0]


def threads_of_a_lost_model(search):
    """Threads left by a parallel state one group of which a cycle refers to, and how often cycles were looked for."""
    from megatron.core import parallel_state

    def lose_a_model():
        cycle = {"group": parallel_state.get_tensor_model_parallel_group()}
        cycle["self"] = cycle

    return _with_searches_counted(lose_a_model, search)


def searches_without_a_model():
    return _with_searches_counted(lambda: None, True)[1]


def _with_searches_counted(between, search):
    import gc

    from megatron.core import parallel_state

    from mindspeed_llm import patches
    from mindspeed_llm.parallel.setup import release_groups

    def count(*args):
        searched.append(1)
        return plain(*args) if search else 0

    patches.apply()
    release_groups()
    parallel_state.initialize_model_parallel()
    parallel_state.destroy_model_parallel()
    threads, searched, plain = len(os.listdir("/proc/self/task")), [], gc.collect
    parallel_state.initialize_model_parallel()
    between()
    gc.disable()
    gc.collect = count
    try:
        parallel_state.destroy_model_parallel()
        return len(os.listdir("/proc/self/task")) - threads, len(searched)
    finally:
        gc.collect = plain
        gc.enable()
        plain()


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
