"""After a failure: the ranks that are left agree through a store, without a collective."""

import os
import threading
import time

import pytest
import torch.distributed as dist

from mindspeed_llm.errors import UserError
from mindspeed_llm.parallel import survivors as protocol
from mindspeed_llm.parallel.attempt import store_of_attempt
from mindspeed_llm.parallel.last_lines import KEPT_LINES, listening
from mindspeed_llm.parallel.survivors import Alarm, Survivors, has_ended, sign_of_life
from mindspeed_llm.parallel.watch import Watch, is_own


class Will:
    """Saves nothing; remembers what it was told."""

    def __init__(self, finished, holders=None, broken=False):
        self.finished, self.holders, self.broken, self.calls = finished, holders, broken, []

    def freeze(self, seconds):
        return self.finished

    def decide(self, finished):
        self.calls.append(("decide", finished))
        return {"iteration": 7, "holders": self.holders} if self.holders else {"reason": "nothing is whole"}

    def prepare(self, decision):
        self.calls.append(("prepare", decision["judge"]))

    def write(self, decision):
        if self.broken:
            raise OSError("disk is full")
        self.calls.append(("write", decision["iteration"]))

    def complete(self, decision):
        self.calls.append(("complete", decision["iteration"]))
        return "iter_0000007"


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(protocol, "GONE_SECONDS", 0.3)
    monkeypatch.setattr(protocol, "POLL_SECONDS", 0.01)


def gather(wills, alarm, world_size, lines=""):
    """Words of each rank that is left (its will in `wills`), after `alarm`."""
    store, words = dist.HashStore(), {}
    ranks = {rank: Survivors(store, rank, world_size, lambda rank: lines) for rank in wills}
    for rank in range(world_size):
        store.set(f"beat/{rank}", f"1|host{rank}|{100 + rank}")
    next(iter(ranks.values())).give_alarm(alarm)
    threads = [
        threading.Thread(target=lambda r=rank: words.__setitem__(r, ranks[r].gather(wills[r]))) for rank in wills
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(words) == len(wills)
    return "".join(words.values())


def test_a_killed_rank_is_named_and_the_others_save(quick):
    wills = {rank: Will(7, holders=[0, 2]) for rank in (0, 2, 3)}
    said = gather(wills, Alarm(2, "rank 2 failed first: connection closed by peer", own=False), 4)
    assert "error: rank 1 on host1 failed first: its process 101 is gone" in said
    assert "saved iteration 7 from the ranks that are left to iter_0000007" in said
    calls = [call for will in wills.values() for call in will.calls]
    assert ("decide", {0: 7, 2: 7, 3: 7}) in calls and calls.count(("complete", 7)) == 1
    judge = next(rank for rank, will in wills.items() if ("complete", 7) in will.calls)
    assert {rank for rank, will in wills.items() if ("write", 7) in will.calls} == {0, 2, judge}


def test_a_rank_that_raised_is_the_cause_with_its_last_lines(quick):
    wills = {rank: Will(7, holders=[0]) for rank in (0, 1)}
    said = gather(wills, Alarm(1, "rank 1 on b failed first: OSError: storage"), 2, lines="one\ntwo")
    assert said.index("OSError: storage") < said.index("rank 1 | one") < said.index("rank 1 | two")
    assert "saved iteration 7" in said


def test_nothing_is_completed_when_a_share_is_missing(quick):
    wills = {0: Will(7, holders=[0, 1], broken=True), 1: Will(7, holders=[0, 1], broken=True)}
    said = gather(wills, Alarm(1, "rank 1 failed first: OSError: storage"), 2)
    assert "iteration 7 is not saved, because RuntimeError: rank 0: OSError: disk is full" in said
    assert not any(call[0] == "complete" for will in wills.values() for call in will.calls)


def test_what_is_not_sound_or_not_whole_is_not_saved(quick):
    wills = {rank: Will(7, holders=[0]) for rank in (0, 1)}
    assert gather(wills, Alarm(1, "replicas differ", savable=False), 2) == ""
    assert not any(will.calls for will in wills.values())
    assert "nothing is whole" in gather({0: Will(7)}, Alarm(1, "rank 1 failed first: x"), 1)
    assert "--save is not given" in gather({0: None}, Alarm(0, "rank 0 failed first: x"), 1)


def test_errors_of_others_are_told_from_own_ones():
    for text in ("[pair.cc:537] Read error: Connection reset by peer", "NCCL communicator was aborted", "Gloo failed"):
        assert not is_own(RuntimeError(text))
    assert is_own(RuntimeError("index 7 is out of bounds")) and is_own(OSError("connection to the disk timed out"))
    assert is_own(UserError("data: timed out"))


def test_ranks_of_another_start_are_not_taken_for_living_ones():
    store = dist.HashStore()
    store.set("attempt/asks/1", "of a rank that was killed")
    for _ in range(2):
        found = {}
        threads = [
            threading.Thread(target=lambda r=rank, to=found: to.__setitem__(r, store_of_attempt(store, r, 3, 10.0)))
            for rank in (2, 1, 0)
        ]
        for thread in threads:
            thread.start()
            time.sleep(0.02)
        for thread in threads:
            thread.join(10)
        assert not found[2].check(["address"])  # what the start before left
        found[1].set("address", "here")
        assert found[0].get("address") == found[2].get("address") == b"here"


def test_a_rank_that_does_not_come_is_named():
    with pytest.raises(TimeoutError, match=r"ranks \[1\] have not come"):
        store_of_attempt(dist.HashStore(), 0, 2, 0.1)


def test_the_last_lines_are_kept(capsys):
    with listening() as lines:
        print("\n".join(f"line {n}" for n in range(KEPT_LINES + 3)))
        print("10%\r20%\r\n", end="")
    assert lines.text().splitlines()[0] == "line 4" and lines.text().endswith(f"line {KEPT_LINES + 2}\n20%")
    print("not heard")
    assert "not heard" not in lines.text() and "line 0\n" in capsys.readouterr().out


def test_a_process_that_has_ended_is_known_at_once():
    child = os.fork()
    if child == 0:
        os._exit(0)
    sign = sign_of_life(3).replace(f"|{os.getpid()}|", f"|{child}|")
    deadline = time.monotonic() + 30
    while not has_ended(sign) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert has_ended(sign)  # even though nobody has asked for its status
    os.waitpid(child, 0)
    assert has_ended(sign) and not has_ended(sign_of_life(3))
    assert not has_ended(sign.replace(sign.split("|")[3], "another host")) and not has_ended("")


def test_a_silent_rank_gives_the_alarm(monkeypatch):
    store = dist.HashStore()
    watch, _ = Watch(store, 0, 2, 10.0), Watch(store, 1, 2, 10.0)
    watch._look_around()
    assert watch.first_failure() is None
    monkeypatch.setattr("mindspeed_llm.parallel.watch.SILENT_SECONDS", 0.01)
    time.sleep(0.05)
    watch._look_around()
    assert "rank 1 on " in watch.first_failure() and "no sign of life" in watch.first_failure()


def test_the_last_word_of_a_rank_that_leaves_stands():
    store = dist.HashStore()
    watch, other = Watch(store, 1, 2, 10.0), Watch(store, 0, 2, 10.0)
    watch.end()
    watch.show_life()
    assert store.get("beat/1") == b"left"
    other.seen[1] = "left", time.monotonic() - 1e6
    other._look_around()
    assert other.first_failure() is None
