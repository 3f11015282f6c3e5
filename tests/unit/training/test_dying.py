"""Which ranks can save a whole state, which iteration a rank stands at, and what a signal does."""

import io
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from mindspeed_llm.checkpoint.boxes import Box
from mindspeed_llm.parallel.layer_map import layer_map
from mindspeed_llm.parallel.layout import ParallelLayout
from mindspeed_llm.training import standing as standing_module
from mindspeed_llm.training.dying import as_finished, find_holders, stands_for_main
from mindspeed_llm.training.hooks import Wish
from mindspeed_llm.training.standing import Standing, persistent_buffers
from mindspeed_llm.training.stopping import StopRequest


def layout(world_size, pp=1, **sizes):
    return ParallelLayout(layer_map(4, pp), world_size, **sizes)


@dataclass
class Progress:
    iteration: int = 0


class Loop:
    """What `Standing` sees of the training loop."""

    def __init__(self):
        self.progress = Progress()
        self.model = SimpleNamespace(chunks=[torch.nn.BatchNorm1d(2)])
        self.scheduler = SimpleNamespace(state_dict=lambda: {"num_steps": self.progress.iteration})
        self.optimizer = SimpleNamespace(chained_optimizers=[])


@pytest.fixture
def loop(monkeypatch):
    monkeypatch.setattr(standing_module, "rng_key", lambda: "rng_state/shard_0.0.0_1.1.1")
    monkeypatch.setattr(standing_module, "rng_states", lambda: {"torch": torch.get_rng_state()})
    return Loop()


def iterate(standing, loop):
    standing.before_batch(loop)
    standing.flags()
    standing.before_update(loop)
    loop.progress.iteration += 1
    standing.after_step(loop, None, 1.0)


def test_a_rank_stands_at_its_last_finished_iteration(loop):
    standing = Standing(0, dist.HashStore())
    assert Standing(0, dist.HashStore()).freeze(0.01) is None  # nothing finished, nothing begun
    iterate(standing, loop)
    iterate(standing, loop)
    running_mean = loop.model.chunks[0].running_mean
    running_mean += 1  # the next iteration's forward pass
    assert standing.freeze(0.01) == 2
    assert standing.finished.scheduler == {"num_steps": 2}
    box = Box("bias", (2,), (0,), running_mean)
    assert as_finished(box, standing.finished).tensor.tolist() == [0, 0] and box.tensor.tolist() == [1, 1]


def test_a_rank_in_an_update_stands_nowhere_and_a_frozen_one_begins_none(loop):
    standing = Standing(0, dist.HashStore())
    iterate(standing, loop)
    standing.before_update(loop)
    assert standing.freeze(0.05) is None
    loop.progress.iteration += 1
    standing.after_step(loop, None, 1.0)
    assert standing.freeze(0.05) == 2
    late = threading.Thread(target=standing.before_update, args=(loop,), daemon=True)
    late.start()
    late.join(0.1)
    assert late.is_alive()


def test_going_back_is_noticed_before_the_next_batch(loop):
    standing = Standing(0, dist.HashStore())
    for _ in range(3):
        iterate(standing, loop)
    with standing.changing():
        loop.progress.iteration = 1
    standing.before_batch(loop)
    assert standing.freeze(0.01) == 1


def test_random_states_of_two_iterations_are_known_to_all(loop):
    store = dist.HashStore()
    standing, other = Standing(1, store), Standing(0, store)
    states = {}
    for _ in range(3):
        iterate(standing, loop)
        states[loop.progress.iteration] = torch.get_rng_state()
        torch.rand(3)
    for iteration in (2, 3):
        ((key, content),) = other.streams_of(1, iteration).items()
        (loaded,) = torch.load(io.BytesIO(content), weights_only=True)
        assert key.startswith("rng_state/shard") and torch.equal(loaded["torch"], states[iteration])
    assert other.streams_of(1, 1) == {} == other.streams_of(3, 3)


def test_random_states_after_a_batch_left_out_are_those_before_it(loop):
    """Another rank may be killed before it can say that it has put its own back."""
    store = dist.HashStore()
    standing, other = Standing(1, store), Standing(0, store)
    iterate(standing, loop)
    before = torch.get_rng_state()
    standing.before_batch(loop)
    torch.rand(3)
    standing.flags()
    torch.set_rng_state(before)
    loop.progress.iteration += 1
    (wrong,) = other.streams_of(1, 2).values()
    assert not torch.equal(torch.load(io.BytesIO(wrong), weights_only=True)[0]["torch"], before)
    standing.after_step(loop, None, 1.0)
    assert standing.finished.streams_of == 1
    for iteration in (1, 2):
        (content,) = other.streams_of(1, iteration).values()
        assert torch.equal(torch.load(io.BytesIO(content), weights_only=True)[0]["torch"], before)


def test_persistent_buffers_alone_are_copied():
    module = torch.nn.Module()
    module.register_buffer("kept", torch.ones(1))
    module.register_buffer("derived", torch.ones(1), persistent=False)
    assert [b is module.kept for b in persistent_buffers(module)] == [True]


@pytest.mark.parametrize(
    ("sizes", "left", "holders"),
    [
        (dict(world_size=2), [0], [0]),  # a replica is there
        (dict(world_size=4, tp=2), [0, 3], [0, 3]),  # each half of the other replica
        (dict(world_size=4, tp=2), [0, 2], []),  # the same half twice
        (dict(world_size=4, pp=2), [1, 2], [1, 2]),  # ranks 0 and 1 are the first stage
        (dict(world_size=4, pp=2), [0, 1], []),
        (dict(world_size=2, cp=2), [1], [1]),  # context-parallel ranks hold the same weights
        (dict(world_size=4, ep=2), [1, 2], [1, 2]),  # the experts of 0 are on 2 as well
        (dict(world_size=4, ep=2), [0, 2], []),
        (dict(world_size=8, tp=2, pp=2), [1, 2, 4, 7], [1, 2, 4, 7]),
    ],
)
def test_holders_make_a_whole_model(sizes, left, holders):
    assert find_holders(layout(**sizes), left, spread=False) == holders


def test_a_spread_optimizer_needs_every_rank():
    assert find_holders(layout(4), [0, 1, 2, 3], spread=True) == [0, 1, 2, 3]
    assert find_holders(layout(4), [0, 1, 2], spread=True) == []


def test_replicas_stand_for_the_main_box():
    def box(replica):
        return Box("w", (2,), (0,), torch.zeros(2), replica)

    assert [stands_for_main(box(r)) for r in (0, 1, (0, 0, 3), (0, 1, 0), (1, 0, 0))] == [
        True,
        False,
        True,
        False,
        False,
    ]


def test_a_signal_is_a_request_that_all_ranks_hear_of():
    asked, other = StopRequest(), StopRequest()
    before = signal.getsignal(signal.SIGUSR1)
    with asked.listening():
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)  # the launcher hands it on: the same request
        time.sleep(0.01)
    assert signal.getsignal(signal.SIGUSR1) == before
    total = {"stop": asked.flags()["stop"] + other.flags()["stop"]}
    for request, reason in ((asked, "SIGUSR1"), (other, "a signal to 1 other rank")):
        assert request.end_of_iteration(None) == Wish.NOTHING
        request.after_backward(None, SimpleNamespace(flags=total))
        assert request.end_of_iteration(None) == Wish.LEAVE and request.reason == reason


def test_a_second_signal_ends_the_process_at_once():
    code = (
        "import os, signal, sys, time\n"
        "from mindspeed_llm.training import stopping\n"
        "stopping.SAME_REQUEST_SECONDS = 0.0\n"
        "with stopping.StopRequest().listening():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('one is a request', flush=True)\n"
        "    time.sleep(0.01)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(5)\n"
        "    print('still here')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "one is a request\n" and done.returncode == -signal.SIGTERM
