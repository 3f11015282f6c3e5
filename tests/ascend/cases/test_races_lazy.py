"""Streams that run as late as they may: whoever forgets to wait sees old numbers, every time.

This file runs with ASCEND_SIMULATOR_LAZY=1.
"""

import json

import pytest
import torch
from cases.jobs import join_on_npu, run
from cases.late_collectives import overwritten, seen

from mindspeed_llm.checkpoint.toy import make_toy
from mindspeed_llm.errors import UserError
from mindspeed_llm.testing.pool import pool

SIZE = 1000


def test_a_copy_to_the_host_is_there_after_waiting_and_not_before():
    host = torch.zeros(SIZE, pin_memory=True)
    host.copy_(torch.ones(SIZE, device="npu"), non_blocking=True)
    assert float(host.sum()) == 0
    torch.npu.current_stream().synchronize()
    assert float(host.sum()) == SIZE


def _fetch_on_a_side_stream(waits):
    """Sum of a tensor that a side stream fetches from the host and the main stream reads."""
    side, host = torch.npu.Stream(), torch.ones(SIZE).pin_memory()
    target = torch.zeros(SIZE, device="npu")
    arrived = torch.npu.Event()
    side.wait_stream(torch.npu.current_stream())
    with torch.npu.stream(side):
        target.copy_(host, non_blocking=True)
        arrived.record()
    if waits:
        torch.npu.current_stream().wait_event(arrived)
    return float((target * 2).sum())


def test_a_fetched_tensor_is_read_after_its_event():
    assert _fetch_on_a_side_stream(waits=True) == 2 * SIZE
    assert _fetch_on_a_side_stream(waits=False) == 0


def _store_on_a_side_stream(waits):
    """What a side stream stores of a tensor that the main stream then overwrites."""
    side, host = torch.npu.Stream(), torch.zeros(SIZE).pin_memory()
    source = torch.ones(SIZE, device="npu")
    stored = torch.npu.Event()
    side.wait_stream(torch.npu.current_stream())
    with torch.npu.stream(side):
        host.copy_(source, non_blocking=True)
        stored.record()
    if waits:
        torch.npu.current_stream().wait_event(stored)
    source.fill_(5.0)
    side.synchronize()
    return float(host.sum())


def test_a_tensor_is_overwritten_after_it_is_stored():
    assert _store_on_a_side_stream(waits=True) == SIZE
    assert _store_on_a_side_stream(waits=False) == 5 * SIZE


def test_events_that_are_asked_for_come_to_an_end():
    event, host = torch.npu.Event(), torch.zeros(SIZE, pin_memory=True)
    host.copy_(torch.ones(SIZE, device="npu"), non_blocking=True)
    event.record()
    questions = 0
    while not event.query():
        questions += 1
    assert questions > 1 and float(host.sum()) == SIZE


# Sum of the result before the collective has been waited for, and after, over two ranks of ones.
COLLECTIVES = {
    "all_reduce": (4, 8),
    "all_gather": (0, 8),
    "reduce_scatter": (0, 4),
    "all_to_all": (0, 4),
    "p2p": (0, 4),
}


@pytest.mark.parametrize("what", COLLECTIVES)
def test_results_of_a_collective_are_there_after_waiting_and_not_before(what):
    assert pool(2, join_on_npu).run(seen, what) == [COLLECTIVES[what]] * 2


@pytest.mark.parametrize("what", COLLECTIVES)
def test_writing_into_a_collective_under_way_is_noticed(what):
    for said in pool(2, join_on_npu).run(overwritten, what):
        assert "a race" in said


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """(words, cache) of a run of two steps."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"{i} and then some words"}) + "\n" for i in range(40))
    )
    model = make_toy("llama", folder / "llama", num_hidden_layers=2)
    words = "--train-iters 2 --lr 1e-3 --global-batch-size 2 --micro-batch-size 1 --seq-length 32 --eval-iters 0"
    return f"{words} --split 1,0 --load {model} --data-path {folder / 'text.jsonl'}", str(folder / "cache")


@pytest.fixture(scope="module")
def on_cpu(job):
    words, cache = job
    return pool(1).run(run, "pretrain", words, cache, timeout=400)[0]["train"]


OVERLAPPING = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
LAYOUTS = {
    "data": OVERLAPPING,
    "parts of the sequence": "--tensor-model-parallel-size 2 --sequence-parallel --use-ascend-coc --coc-parallel-num 2",
    "ring": "--context-parallel-size 2",
    "pipeline": "--pipeline-model-parallel-size 2",
}


@pytest.mark.parametrize("more", ["", OVERLAPPING])
def test_a_run_does_not_depend_on_when_streams_run(job, on_cpu, more):
    """The losses are those of the CPU although every copy is as late as it may be."""
    words, cache = job
    assert run("pretrain", f"{words} {more}", cache)["train"] == pytest.approx(on_cpu, rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nor_on_when_collectives_end(job, on_cpu, layout):
    words, cache = job
    found = pool(2, join_on_npu).run(run, "pretrain", f"{words} {LAYOUTS[layout]}", cache, timeout=400)[-1]
    assert found["train"] == pytest.approx(on_cpu, rel=1e-5)


def without_waiting(words, cache):
    """A run whose products in parts do not wait for what other ranks send."""
    import types
    from unittest import mock

    from mindspeed_llm.ops import parallel_matmul

    dist = parallel_matmul.dist

    def gather(*args, **kwargs):
        dist.all_gather_into_tensor(*args, **kwargs)
        return types.SimpleNamespace(wait=lambda: True)

    careless = types.SimpleNamespace(all_gather_into_tensor=gather, reduce_scatter_tensor=dist.reduce_scatter_tensor)
    torch.npu.empty_cache()  # new memory holds no numbers; what earlier runs left might be the right ones
    with mock.patch.object(parallel_matmul, "dist", careless):
        return run("pretrain", words, cache)["train"]


def test_a_run_that_does_not_wait_is_noticed(job):
    words, cache = job
    more = LAYOUTS["parts of the sequence"]
    with pytest.raises(UserError, match="loss: nan"):
        pool(2, join_on_npu).run(without_waiting, f"{words} {more}", cache, timeout=400)
