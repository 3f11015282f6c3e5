"""A device without memory left: told apart, and explained in one line."""

import os
import re
import subprocess
import sys
import threading
import traceback
from types import SimpleNamespace

import pytest
import torch

from mindspeed_llm import accelerator
from mindspeed_llm.accelerator.out_of_memory import refused_bytes
from mindspeed_llm.errors import OutOfMemory
from mindspeed_llm.parallel import watch
from mindspeed_llm.plan.memory import MemoryEstimate
from mindspeed_llm.training import out_of_memory
from mindspeed_llm.training.out_of_memory import OutOfMemoryAdvice, Shortage

# 8 layers that save about 270 MB in a room of 200 MiB.
RUN = "--seq-length 256 --micro-batch-size 32 --global-batch-size 32 --train-iters 2 --eval-iters 0 --split 100"
ROOM_MIB = 200
LIMITED = """
import resource, sys
from mindspeed_llm.cli import pretrain
from mindspeed_llm.training import run
from mindspeed_llm.accelerator.cpu import CPU

class Limited(run.OutOfMemoryAdvice):
    def __init__(self, *arguments):
        pages = int(open("/proc/self/statm").read().split()[0])
        limit = pages * resource.getpagesize() + int(sys.argv[1]) * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        super().__init__(*arguments)

run.OutOfMemoryAdvice = Limited
sys.exit(pretrain.main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from mindspeed_llm.checkpoint.toy import make_toy

    wide = {"num_hidden_layers": 8, "initializer_range": 0.02}
    return make_toy("llama", tmp_path_factory.mktemp("toy") / "llama", **wide)


def trained(model, corpus, tmp_path):
    """Exit status and output of a training in a process that has ROOM_MIB for tensors."""
    command = f"{RUN} --load {model} --data-path {corpus} --num-threads 1 --progress lines"
    # Arenas of threads would take address space without using it.
    variables = os.environ | {"MALLOC_ARENA_MAX": "1", "MINDSPEED_LLM_CACHE": str(tmp_path / "cache")}
    return subprocess.run(
        [sys.executable, "-c", LIMITED, str(ROOM_MIB), *command.split()], env=variables, capture_output=True, text=True
    )


@pytest.mark.slow
def test_the_error_says_what_would_have_fitted(model, corpus, tmp_path):
    found = trained(model, corpus, tmp_path)
    assert found.returncode == 1, found.stderr[-3000:]
    (line,) = [line for line in found.stderr.splitlines() if line.startswith("error: out of memory: ")]
    asked = re.match(
        r"error: out of memory: rank 0 asked for (\S+ \S+) more when (\S+) MiB of (\S+) MiB were taken, because this "
        r"training needs about \S+ MiB there \(weights .*, gradients .*, optimizer .*, activations .*, temporary .*\); "
        r"try: (.*)",
        line,
    )
    assert asked, line
    assert ROOM_MIB / 2 < float(asked[2]) <= float(asked[3]) <= ROOM_MIB
    assert "Traceback" not in found.stderr
    assert re.search(r"memory of rank 0 when there was no more, MiB +predicted +measured", found.stderr)
    assert re.search(r"weights +([\d.]+) +\1 ", found.stderr)
    assert "--swap" not in asked[4]  # a mapped file is no way out of a limit of addresses


@pytest.mark.parametrize(
    "error, nbytes",
    [
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
                      "tried to allocate 4096 bytes. Error code 12 (Cannot allocate memory)"), 4096),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79 GiB"),
         int(2.5 * 2**30)),
        (RuntimeError("NPU out of memory. Tried to allocate 20.00 MiB (NPU 0; 1.00 GiB total capacity)"), 20 * 2**20),
        (MemoryError(), 0),
        (RuntimeError("std::bad_alloc"), 0),
        (RuntimeError("Expected all tensors to be on the same device"), None),
        (ValueError("out of memory"), None),
    ],
)  # fmt: skip
def test_a_device_without_memory_is_told_apart(error, nbytes):
    assert refused_bytes(error) == nbytes


def test_the_device_s_refusal_counts_where_it_cannot_be_explained(monkeypatch):
    advice = object.__new__(OutOfMemoryAdvice)

    def failing(asked, refusal):
        raise KeyError("a stage")

    monkeypatch.setattr(advice, "_explained", failing, raising=False)
    with pytest.raises(OutOfMemory, match=r"out of memory: .*tried to allocate 9 bytes.*not known \(KeyError"):
        with advice.explaining():
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")


def test_the_others_hear_of_it_before_changes_are_searched_for(monkeypatch):
    happened = []
    monkeypatch.setattr(out_of_memory.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(out_of_memory, "stages_memory", lambda plan: [MemoryEstimate(1, 1, 1, 1)])
    monkeypatch.setattr(out_of_memory, "advice", lambda plan, shortage: happened.append("search") or "nothing")
    places = SimpleNamespace(vpp=1, layers=lambda stage, chunk: {0: 0})
    layout = SimpleNamespace(coordinates=lambda rank: SimpleNamespace(pp=0), layers=places)
    advice = OutOfMemoryAdvice(SimpleNamespace(layout=layout), lambda error: happened.append(error))
    with pytest.raises(OutOfMemory, match="; try: nothing$"):
        with advice.explaining():
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
    told, search = happened
    assert str(told).startswith("out of memory: rank 0 asked for 9 B more") and "try:" not in str(told)
    assert search == "search"
    # The rank's error file shows where it was refused.
    assert "DefaultCPUAllocator" in "".join(traceback.format_exception(told))


@pytest.mark.parametrize("says", [True, False])
def test_a_rank_that_searches_is_not_ended_by_its_watch(monkeypatch, says):
    """A plan that takes longer than the grace of a failed rank; without the word to the watch it is ended."""
    monkeypatch.setattr(watch, "GRACE_SECONDS", 0.1)
    ended = threading.Event()
    monkeypatch.setattr(watch.os, "_exit", lambda status: ended.set())
    monkeypatch.setattr(out_of_memory.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(out_of_memory, "stages_memory", lambda plan: [MemoryEstimate(1, 1, 1, 1)])
    own = watch.Watch(torch.distributed.HashStore(), 0, 1, timeout_minutes=1)
    leaving = threading.Thread(target=own._leave)

    def search(plan, shortage):
        assert ended.wait(0.6) != says
        return "less"

    monkeypatch.setattr(out_of_memory, "advice", search)
    places = SimpleNamespace(vpp=1, layers=lambda stage, chunk: {0: 0})
    layout = SimpleNamespace(coordinates=lambda rank: SimpleNamespace(pp=0), layers=places)
    saying = {"saying": own.saying} if says else {}
    advice = OutOfMemoryAdvice(SimpleNamespace(layout=layout), lambda error: leaving.start(), **saying)
    with pytest.raises(OutOfMemory, match="; try: less$"), advice.explaining():
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
    own.end()
    leaving.join()
    assert ended.is_set() != says


@pytest.mark.parametrize("limit", ["SAYING_SECONDS", None])
def test_a_rank_that_never_finds_words_or_never_ends_is_ended(monkeypatch, limit):
    monkeypatch.setattr(watch, "GRACE_SECONDS", 0.05)
    if limit:
        monkeypatch.setattr(watch, limit, 0.1)
    ended = []
    monkeypatch.setattr(watch.os, "_exit", ended.append)
    own = watch.Watch(torch.distributed.HashStore(), 0, 1, timeout_minutes=1)
    with own.saying():
        if limit:
            own._leave()
    if not limit:  # it has said what it had to say
        own._leave()
    assert ended == [1]


def test_what_another_plan_may_come_to():
    """Of 200: 5 in pieces, 30 more than predicted, a tenth of the activations, and one of ten layers' gradients."""
    predicted = MemoryEstimate(10, 10, 10, 100)
    assert Shortage(predicted, 10, 0, room=200, taken=120, lost=5, asked=40).usable == 200 - 5 - 30 - 10 - 10
    assert Shortage(predicted, 10, 0, room=200, taken=60, lost=0, asked=40).usable == 200 - 10 - 10


def test_torch_refuses_on_a_cpu_as_is_expected():
    with pytest.raises(RuntimeError) as refusal:
        torch.empty(2**50, dtype=torch.uint8)
    assert refused_bytes(refusal.value) == 2**50


def test_the_room_of_a_process_shrinks_by_what_it_takes(monkeypatch):
    """Under a limit of the address space, which a test can set; other rooms are the host's."""
    code = (
        "import resource, torch; from mindspeed_llm import accelerator; from pathlib import Path\n"
        "size = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize() + 2**28\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size, size))\n"
        "room = accelerator.current().memory_room(); x = torch.ones(2**26, dtype=torch.uint8)\n"
        "print(room, room - accelerator.current().memory_room())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    room, taken = map(int, done.stdout.split())
    assert 2**27 < room <= 2**28
    assert 2**26 <= taken < 2**26 + 2**21
    whole = accelerator.current().memory_room()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert accelerator.current().memory_room() == pytest.approx(whole / 4, rel=0.2)
