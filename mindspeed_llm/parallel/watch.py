"""Who failed first, and who is late: each rank tells the others through the launcher's store, in a thread of its own.

A collective only says that it waited too long, or that a connection broke; both happen on the ranks that did nothing
wrong. So the first rank that raises writes its name and message where all can read it, and ranks that would wait for
it forever end within seconds. When a step takes half of the time limit, every rank says where it stands in the code;
those that are not waiting in a collective are the ones that the others wait for.
"""

from __future__ import annotations

import linecache
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from mindspeed_llm.errors import UserError

POLL_SECONDS = 1.0
# A rank that fails by itself, or is ended by its launcher, gets this long before the watch ends it.
GRACE_SECONDS = 5.0
# A rank that waits this long in a collective after the launcher's store is gone waits for nobody.
ALONE_SECONDS = 20.0
# Share of the collectives' time limit after which a step without progress is looked into.
LATE_SHARE = 0.5
FAILURE, LATE = "mindspeed_llm/first_failure", "mindspeed_llm/late"


class Watch:
    """One rank's view of the others.

    Args:
        store: any torch.distributed store that all ranks share, for this object alone.
        timeout_minutes: how long a collective may take.
    """

    def __init__(self, store: Any, rank: int, world_size: int, timeout_minutes: float) -> None:
        self.store, self.rank, self.world_size = store, rank, world_size
        self.late_after = LATE_SHARE * timeout_minutes * 60
        self.main_thread = threading.get_ident()
        self.stopped = threading.Event()
        self.beats, self.said_at = 0, -1
        self.last_beat = time.monotonic()
        self.thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def beat(self) -> None:
        """This rank has begun another batch."""
        self.last_beat = time.monotonic()
        self.beats += 1

    def report(self, error: BaseException) -> bool:
        """Tell everybody that this rank failed; whether it is the first to."""
        told = f"rank {self.rank} on {socket.gethostname()} failed first: {one_line(error)}"
        return self.store.compare_set(FAILURE, "", told).decode() == told

    def first_failure(self) -> str | None:
        """What the first failing rank said, None while nobody failed."""
        return self.store.get(FAILURE).decode() if self.store.check([FAILURE]) else None

    def _run(self) -> None:
        try:
            while not self.stopped.wait(POLL_SECONDS):
                if (failure := self.first_failure()) is not None:
                    self._leave(failure)
                if time.monotonic() - self.last_beat > self.late_after:
                    self._say_where()
        except RuntimeError:
            self._outlive_store()

    def _outlive_store(self) -> None:
        """The host of the store has ended. This rank may have work left, but whom would it still hear from?"""
        waits_since = time.monotonic()
        while not self.stopped.wait(POLL_SECONDS):
            if not whereabouts(self.main_thread)[0]:
                waits_since = time.monotonic()
            elif time.monotonic() - waits_since > ALONE_SECONDS:
                self._leave("the launcher's store is gone, its host has ended")

    def _leave(self, failure: str) -> None:
        """End this process, unless it ends by itself first."""
        if self.stopped.wait(GRACE_SECONDS):
            return
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: rank {self.rank} ends too: {failure}", file=sys.stderr, flush=True)
        os._exit(1)

    def _say_where(self) -> None:
        """Publish where this rank stands; the first rank that waits collects and prints, once for a batch."""
        waits, place = whereabouts(self.main_thread)
        batch, seconds = self.beats, time.monotonic() - self.last_beat
        word = f"{batch}|{'waits' if waits else 'works'}|{socket.gethostname()}|{place}"
        self.store.set(f"{LATE}/of/{self.rank}", word)
        if not waits or self.said_at == batch:
            return
        self.said_at = batch
        if self.store.compare_set(f"{LATE}/{batch}", "", str(self.rank)).decode() != str(self.rank):
            return
        if self.stopped.wait(3 * POLL_SECONDS):
            return
        known = {rank: self._word_of(rank, batch) for rank in range(self.world_size)}
        print(late_line(known, seconds), file=sys.stderr, flush=True)

    def _word_of(self, rank: int, batch: int) -> str | None:
        """What a rank has published about this batch, or the one before if it has not begun this one."""
        key = f"{LATE}/of/{rank}"
        if not self.store.check([key]):
            return None
        number, _, word = self.store.get(key).decode().partition("|")
        return word if int(number) >= batch - 1 else None


def late_line(known: dict[int, str | None], seconds: float) -> str:
    """The line about ranks that others wait for.

    Args:
        known: by rank "waits|host|place", "works|host|place", or None for a rank that did not answer.
    """
    late = []
    for rank, word in known.items():
        if word is None:
            late.append(f"rank {rank} does not answer")
            continue
        state, host, place = word.split("|", 2)
        if state == "works":
            late.append(f"rank {rank} on {host} is at {place}")
    waiting = sum(word is not None and word.startswith("waits") for word in known.values())
    who = "; ".join(late[:8]) or "nobody: all ranks wait, so their collectives do not match"
    return f"late: no step was finished for {seconds:.0f} s; {waiting} of {len(known)} ranks wait for {who}"


def whereabouts(thread: int) -> tuple[bool, str]:
    """(whether the process waits in a collective, "file:line function" of the innermost frame of `thread`)."""
    frames = sys._current_frames()
    own = threading.get_ident()
    waits = any(_waits(frame) for number, frame in frames.items() if number != own)
    frame = frames.get(thread)
    if frame is None:
        return waits, "its end"
    return waits, f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}"


def _waits(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    if file.endswith("torch/distributed/distributed_c10d.py"):
        return True
    in_training = "/megatron/" in file or "/mindspeed_llm/" in file
    return in_training and ".wait(" in linecache.getline(file, frame.f_lineno)


def one_line(error: BaseException) -> str:
    """Type and message of an error; a UserError is its message alone."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


_current: Watch | None = None


def beat() -> None:
    """Tell this rank's watch that the run goes on; nothing without one."""
    if _current is not None:
        _current.beat()


@contextmanager
def watched(timeout_minutes: float) -> Iterator[Watch | None]:
    """Run the body under a watch, which a launcher's store makes possible; without one, just run it.

    The first rank to raise says so before its traceback, and its message is in the launcher's summary. Ranks that
    fail afterwards, because of it, end without a traceback.
    """
    global _current
    if not has_launcher():
        yield None
        return
    _current = Watch(_own_store(), dist.get_rank(), dist.get_world_size(), timeout_minutes)
    _current.thread.start()
    try:
        yield _current
    except Exception as error:
        _fail(_current, error)
        raise
    finally:
        _current.stopped.set()
        _current = None


def has_launcher() -> bool:
    """Whether the process group came from a launcher's environment, with a store at MASTER_ADDR."""
    started = "MASTER_ADDR" in os.environ and "RANK" in os.environ
    return (
        started and dist.is_initialized() and dist.get_world_size() > 1 and dist.get_rank() == int(os.environ["RANK"])
    )


def _own_store() -> Any:
    """A connection to the launcher's store that no blocking call of the process group holds up."""
    store = dist.distributed_c10d._get_default_store()
    return dist.PrefixStore("watch", store.clone() if hasattr(store, "clone") else store)


def _fail(watch: Watch, error: Exception) -> None:
    if watch.report(error):
        if not isinstance(error, UserError):  # the door prints those
            where = f"rank {watch.rank} on {socket.gethostname()}"
            print(f"error: {where} failed first: {one_line(error)}", file=sys.stderr, flush=True)
        get_error_handler().record_exception(error)
        return
    if not isinstance(error, UserError):
        print(f"error: rank {watch.rank} ends too: {watch.first_failure()}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
