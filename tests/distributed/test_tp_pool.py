"""The pool of processes that distributed tests run in."""

import os
import time

import pytest
import torch

from mindspeed_llm.testing.pool import Pool, pool


def rank_and_sum(value):
    total = torch.tensor([float(torch.distributed.get_rank() + value)])
    torch.distributed.all_reduce(total)
    return torch.distributed.get_rank(), float(total), os.getpid(), torch.get_num_threads()


def fail_on_one(rank):
    if torch.distributed.get_rank() == rank:
        raise KeyError("no such thing")
    torch.distributed.barrier()


def die_on_one(rank):
    if torch.distributed.get_rank() == rank:
        os._exit(3)


def divide(a, b):
    return a / b


def sleep(seconds):
    time.sleep(seconds)


def test_every_rank_answers_and_the_processes_stay():
    first, second = pool(2).run(rank_and_sum, 10), pool(2).run(rank_and_sum, 20)
    assert [answer[:2] for answer in first] == [(0, 21.0), (1, 21.0)]
    assert [answer[1] for answer in second] == [41.0, 41.0]
    assert [answer[2] for answer in first] == [answer[2] for answer in second]
    assert [answer[3] for answer in first] == [1, 1]


def test_an_exception_comes_back_with_its_rank_though_the_others_hang():
    crew = Pool(2)
    start = time.monotonic()
    with pytest.raises(KeyError, match="no such thing") as caught:
        crew.run(fail_on_one, 1)
    assert "on rank 1" in caught.value.__notes__[0] and "fail_on_one" in caught.value.__notes__[0]
    assert time.monotonic() - start < 30
    with pytest.raises(RuntimeError, match="rank 0 died"):
        crew.run(die_on_one, 0)
    crew.run(rank_and_sum, 0)
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] gave no answer"):
        crew.run(sleep, 60, timeout=0.5)
    assert not crew._processes


def test_a_failure_that_every_rank_answered_leaves_the_processes_in_use():
    before = [answer[2] for answer in pool(2).run(rank_and_sum, 1)]
    with pytest.raises(ZeroDivisionError):
        pool(2).run(divide, 1, 0)
    assert [answer[2] for answer in pool(2).run(rank_and_sum, 1)] == before


def test_what_cannot_be_sent_is_refused():
    with pytest.raises(ValueError, match="top level of a file"):
        pool(2).run(lambda: None)


def groups_of_a_parallel_state(make):
    from mindspeed_llm.parallel.setup import initialize_distributed

    if make:
        initialize_distributed(tensor_parallel_size=2)
    return len(torch.distributed.distributed_c10d._world.pg_map)


def test_a_pool_that_is_not_used_ends_its_groups():
    pool(1).run(rank_and_sum, 0)
    before = pool(2).run(groups_of_a_parallel_state, False)  # the world, and what other tests have made themselves
    made = pool(2).run(groups_of_a_parallel_state, True)[0]
    assert pool(2).run(groups_of_a_parallel_state, False)[0] == made > before[0] + 4
    pool(1).run(rank_and_sum, 0)
    assert pool(2).run(groups_of_a_parallel_state, False) == before


def threads_after(layouts):
    from mindspeed_llm.models.build import BuildOptions, build_model
    from mindspeed_llm.models.shape import ModelShape
    from mindspeed_llm.parallel.setup import initialize_distributed

    counts = []
    for sizes in layouts:
        initialize_distributed(**sizes)
        build_model(ModelShape("llama", 2, 16, 32, 4, 2, 4, 50, 32), BuildOptions(**sizes))
        counts.append(len(os.listdir("/proc/self/task")))
    return counts


def test_groups_of_earlier_layouts_leave_no_threads():
    """Each of gloo's threads wakes up a hundred times a second."""
    layouts = [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}] * 3
    first, *_, last = pool(2).run(threads_after, layouts)[0]
    assert last <= first
