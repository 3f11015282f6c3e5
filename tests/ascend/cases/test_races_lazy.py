"""Streams that run as late as they may: whoever forgets to wait sees old numbers, every time.

This file runs with ASCEND_SIMULATOR_LAZY=1.
"""

import pytest
import torch

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


@pytest.mark.parametrize("more", ["", "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"])
def test_a_run_does_not_depend_on_when_streams_run(tmp_path, more):
    """The losses are those of the CPU although every copy is as late as it may be."""
    import json

    from cases.jobs import run

    from mindspeed_llm.checkpoint.toy import make_toy
    from mindspeed_llm.testing.pool import pool

    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"{i} and then some words"}) + "\n" for i in range(40))
    )
    model = make_toy("llama", tmp_path / "llama", num_hidden_layers=2)
    words = "--train-iters 2 --lr 1e-3 --global-batch-size 2 --micro-batch-size 1 --seq-length 32 --eval-iters 0"
    words = f"{words} --split 1,0 --load {model} --data-path {tmp_path / 'text.jsonl'} {more}"
    found = run("pretrain", words, str(tmp_path / "cache"))
    expected = pool(1).run(run, "pretrain", words, str(tmp_path / "cache"), timeout=400)[0]
    assert found["train"] == pytest.approx(expected["train"], rel=1e-5)
