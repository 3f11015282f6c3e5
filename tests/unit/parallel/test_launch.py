"""Launch checks and the watch, without processes: what they compare and what they say."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from mindspeed_llm import accelerator
from mindspeed_llm.errors import UserError
from mindspeed_llm.parallel.launch import check_agreement, check_devices, disagreement, versions
from mindspeed_llm.parallel.stacks import late_line, whereabouts
from mindspeed_llm.parallel.survivors import one_line
from mindspeed_llm.parallel.watch import Watch

FACTS = {"torch": "2.13", "--lr": "0.001", "--seed": "1"}


def test_the_odd_rank_and_what_differs_are_named():
    stories = [("a", FACTS), ("a", FACTS), ("b", {**FACTS, "--lr": "0.1"})]
    said = disagreement(stories, "versions or flags")
    assert said.startswith("launch: rank 2 (b) was started with other versions or flags")
    assert "--lr is 0.1 there and 0.001 elsewhere; legal" in said and "torch" not in said


def test_many_differences_are_counted_and_missing_facts_are_named():
    other = {"torch": "2.12", "--lr": "1", "--seed": "2", "more": "x"}
    said = disagreement([("a", other), ("b", FACTS), ("b", FACTS)], "flags")
    assert "rank 0 (a)" in said and "and 1 more" in said and "more is x there and missing elsewhere" in said


def test_agreement_of_one_process_needs_no_group():
    check_agreement({"anything": "at all"}, "flags")


def test_versions_are_of_what_computes():
    assert {"python", "torch", "megatron-core", "mindspeed-llm", "device"} == versions().keys()


@pytest.mark.parametrize("kind, processes, local_rank, refused", [
    ("cuda", 8, 0, True), ("cuda", 4, 3, False), ("cuda", 1, 5, True), ("cpu", 64, 63, False),
])  # fmt: skip
def test_more_processes_than_devices_are_refused(monkeypatch, kind, processes, local_rank, refused):
    device = SimpleNamespace(device_type=kind, name=kind, device_count=lambda: 4)
    monkeypatch.setattr(accelerator, "current", lambda: device)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    if refused:
        with pytest.raises(UserError, match=r"has 4 cuda device\(s\).*legal: 1..4"):
            check_devices()
    else:
        check_devices()


def test_only_the_first_failure_is_kept():
    store = dist.HashStore()
    first, second = Watch(store, 3, 4, 10.0), Watch(store, 1, 4, 10.0)
    assert second.first_failure() is None
    assert first.report(RuntimeError("disk\nfull")) and not second.report(ValueError("broken pipe"))
    assert second.first_failure().startswith("rank 3 on ") and "RuntimeError: disk full" in second.first_failure()


def test_errors_in_one_line():
    assert one_line(UserError("a\nb")) == "a b"
    assert one_line(KeyError("x")) == "KeyError: 'x'"


def test_ranks_that_do_not_wait_are_the_late_ones():
    known = {0: "waits|a|c10d.py:1 all_reduce", 1: "works|b|data.py:94 collate", 2: None}
    said = late_line(known, 61.0)
    assert "61 s; 1 of 3 ranks wait for rank 1 on b is at data.py:94 collate; rank 2 does not answer" in said
    assert "collectives do not match" in late_line({0: "waits|a|x", 1: "waits|a|y"}, 5.0)


def test_whereabouts_of_a_thread():
    arrived, leave = threading.Event(), threading.Event()

    def work():
        arrived.set()
        leave.wait()

    thread = threading.Thread(target=work)
    thread.start()
    arrived.wait()
    time.sleep(0.05)
    waits, place = whereabouts(thread.ident)
    leave.set()
    thread.join()
    assert not waits and "threading.py" in place
    assert whereabouts(thread.ident) == (False, "its end")


def test_a_watch_says_who_is_late_once_for_a_batch(capsys, monkeypatch):
    monkeypatch.setattr("mindspeed_llm.parallel.watch.POLL_SECONDS", 0.01)
    store = dist.HashStore()
    waiting, working, silent = (Watch(store, rank, 3, 10.0) for rank in range(3))
    for watch in (waiting, silent):
        watch.beat()
    monkeypatch.setattr("mindspeed_llm.parallel.watch.whereabouts", lambda thread: (False, "data.py:94 collate"))
    working._say_where(hangs=False)
    monkeypatch.setattr("mindspeed_llm.parallel.watch.whereabouts", lambda thread: (True, "c10d.py:1 wait"))
    waiting._say_where(hangs=False)
    waiting._say_where(hangs=False)
    said = capsys.readouterr().err
    assert said.count("late: ") == 1 and "1 of 3 ranks wait for rank 1 on" in said and "data.py:94 collate" in said
    assert "rank 2 does not answer" in said
    waiting.beat()
    waiting.beat()
    waiting._say_where(hangs=False)
    assert "rank 1 does not answer" in capsys.readouterr().err  # what it said was about a batch long ago


class GoneStore:
    """A store whose host has ended."""

    def set(self, key, value):
        pass

    def check(self, keys):
        raise RuntimeError("connection reset")


@pytest.mark.parametrize("waits", [True, False])
def test_only_a_rank_that_waits_leaves_when_the_store_is_gone(monkeypatch, capsys, waits):
    monkeypatch.setattr("mindspeed_llm.parallel.watch.POLL_SECONDS", 0.01)
    monkeypatch.setattr("mindspeed_llm.parallel.watch.ALONE_SECONDS", 0.05)
    monkeypatch.setattr("mindspeed_llm.parallel.watch.whereabouts", lambda thread: (waits, "somewhere"))
    watch = Watch(GoneStore(), 1, 2, 10.0)
    left = []

    def leave():
        left.append(True)
        watch.stopped.set()

    monkeypatch.setattr(watch, "_leave", leave)
    threading.Timer(0.5, watch.stopped.set).start()
    watch._run()
    assert bool(left) == waits == ("store is gone" in capsys.readouterr().err)
