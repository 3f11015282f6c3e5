"""Who failed first, and who is late: each rank tells the others through the launcher's store, in a thread of its own.

A collective only says that it waited too long, or that a connection broke; both happen on the ranks that did nothing
wrong. So a rank that raises says so where all can read it, every rank shows each second that it lives, and a rank that
was killed is known by its silence. What follows is agreed upon in `survivors`: what is sound is saved, and all ranks
end within seconds, so that the launcher can start them again.

When a step takes half of the collectives' time limit, every rank says where it stands in the code; those that are not
waiting in a collective are the ones that the others wait for. With a limit of its own (`--hang-timeout`) that is an
error, and the late ranks show their stacks.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from mindspeed_llm.errors import OutOfMemory, UserError
from mindspeed_llm.parallel.last_lines import LastLines, listening
from mindspeed_llm.parallel.stacks import all_stacks, late_line, whereabouts
from mindspeed_llm.parallel.survivors import Alarm, LastWill, Survivors, has_ended, one_line, sign_of_life

POLL_SECONDS = 1.0
# A rank that fails by itself, or is ended by its launcher, gets this long before the watch ends it.
GRACE_SECONDS = 5.0
# More time for one that is about to say what would have helped; launchers give 30 s (torchrun's default) from the first
# rank's end on.
SAYING_SECONDS = 20.0
# A rank that waits this long in a collective after the launcher's store is gone waits for nobody.
ALONE_SECONDS = 20.0
# Silence after which a rank is taken for gone: by itself, and when something else (a signal) points to it. Python code
# cannot be silent for seconds; a library that holds the interpreter's lock can.
SILENT_SECONDS, SUSPECT_SECONDS = 30.0, 4.0
# Share of the collectives' time limit after which a step without progress is looked into.
LATE_SHARE = 0.5
# What gloo, NCCL and HCCL say when another rank has gone: the failure is not this rank's.
OF_OTHERS = re.compile(
    r"connection (closed|reset|refused)|broken pipe|timed out|timeout|remote process exited|closed by peer|gloo|nccl "
    r"(error|communicator)|hccl|socket",
    re.IGNORECASE,
)


class Watch:
    """One rank's view of the others.

    Args:
        store: any torch.distributed store that all ranks share, for this object alone.
        timeout_minutes: how long a collective may take.
        hang_seconds: how long a step may take, None for any time.
        logs: directory for `rank_K.err`, None for none.
        lines: what this rank printed last.

    Attributes:
        will: what can be saved after a failure, None while nothing can.
        over: set when everything that follows a failure is done.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        world_size: int,
        timeout_minutes: float,
        hang_seconds: float | None = None,
        logs: Path | None = None,
        lines: LastLines | None = None,
    ) -> None:
        self.store, self.rank, self.world_size = store, rank, world_size
        self.late_after = LATE_SHARE * timeout_minutes * 60
        self.hang_after, self.logs, self.lines = hang_seconds, logs, lines or LastLines()
        self.main_thread = threading.get_ident()
        self.stopped, self.over, self.alerted = threading.Event(), threading.Event(), threading.Event()
        self.speaking, self.suspicious = threading.Lock(), False
        self.said = threading.Event()
        self.said.set()
        self.will: LastWill | None = None
        self.told: bool | None = None
        self.beats, self.said_at, self.dumped_at = 0, -1, -1
        self.last_beat = time.monotonic()
        self.survivors = Survivors(store, rank, world_size, self._lines_of)
        self.signs, self.told_lines = 0, -1
        self.seen: dict[int, tuple[str, float]] = {}
        self.show_life()
        self.thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def beat(self) -> None:
        """This rank has begun another batch."""
        self.last_beat = time.monotonic()
        self.beats += 1

    def report(self, error: BaseException) -> bool:
        """Tell everybody that this rank failed; whether it is the first to."""
        own = is_own(error)
        refusal = isinstance(error, UserError) and not isinstance(error, OutOfMemory)  # maybe of the very state
        told = f"rank {self.rank} on {socket.gethostname()} failed first: {one_line(error)}"
        self.lines.stop()
        self._tell_lines()  # those that came since the last sign of life; whoever ends the log reads them
        first = self.survivors.give_alarm(Alarm(self.rank, told, own, savable=not refusal))
        self.alerted.set()
        return first

    def first_failure(self) -> str | None:
        """What the first failing rank said, None while nobody failed."""
        alarm = self.survivors.alarm()
        return alarm.told if alarm else None

    def show_life(self) -> None:
        """Say that this rank lives, and what it printed."""
        with self.speaking:
            if self.stopped.is_set():
                return
            self.signs += 1
            self.store.set(f"beat/{self.rank}", sign_of_life(self.signs))
        self._tell_lines()

    def _tell_lines(self) -> None:
        if self.lines.count != self.told_lines:
            self.told_lines = self.lines.count
            self.store.set(f"lines/{self.rank}", self.lines.text())

    def _lines_of(self, rank: int) -> str:
        return self.store.get(f"lines/{rank}").decode() if self.store.check([f"lines/{rank}"]) else ""

    def _run(self) -> None:
        try:
            while not self._pause():
                self.show_life()
                if self.survivors.alarm() is None:
                    self._look_around()
                if self.survivors.alarm() is not None:
                    return self._end_run()
                waited = time.monotonic() - self.last_beat
                if self.hang_after is not None and self.beats and waited > self.hang_after:
                    self._say_where(hangs=True)
                elif waited > self.late_after:
                    self._say_where(hangs=False)
        except (RuntimeError, OSError):
            self.over.set()
            self._outlive_store()
        finally:
            self.over.set()

    def _pause(self) -> bool:
        """Whether the watch ends."""
        self.alerted.wait(POLL_SECONDS)
        return self.stopped.is_set() and not self.alerted.is_set()

    def _look_around(self) -> None:
        """Give the alarm when a rank is silent: each watches the next one, and everybody once something is wrong."""
        limit = SUSPECT_SECONDS if self.suspicious else SILENT_SECONDS
        others = range(self.world_size) if self.suspicious else [(self.rank + 1) % self.world_size]
        for rank in others:
            sign, now = self.survivors.beat_of(rank), time.monotonic()
            if self.seen.get(rank, ("", 0.0))[0] != sign:
                self.seen[rank] = sign, now
            if rank == self.rank or sign in ("", "left"):
                continue
            if has_ended(sign) or now - self.seen[rank][1] > limit:
                host = sign.split("|")[1]
                told = f"rank {rank} on {host} failed first: it gives no sign of life"
                self.survivors.give_alarm(Alarm(rank, told, own=False))

    def _end_run(self) -> None:
        """Save what can be saved together with the others, then end this process unless it ends by itself."""
        self.alerted.set()
        alarm = self.survivors.alarm()
        self._write_error_file(alarm)
        try:
            with _Beating(self):
                words = self.survivors.gather(self.will)
        except (RuntimeError, OSError) as wrong:
            words = f"error: {alarm.told}\nerror: the end could not be agreed on: {one_line(wrong)}\n"
        if words:
            print(words, end="", file=sys.stderr, flush=True)
        self.over.set()
        self._leave()

    def _leave(self) -> None:
        if self.stopped.wait(GRACE_SECONDS):
            return
        if not self.said.is_set():
            self.said.wait(SAYING_SECONDS)
            if self.stopped.wait(GRACE_SECONDS):
                return
        sys.stdout.flush()
        os._exit(1)

    @contextmanager
    def saying(self) -> Iterator[None]:
        """The body finds words for this rank's failure: within limits, the watch does not end the rank meanwhile."""
        self.said.clear()
        try:
            yield
        finally:
            self.said.set()

    def _write_error_file(self, alarm: Alarm, error: BaseException | None = None) -> None:
        if self.logs is None or not alarm.savable:  # a refusal says all there is to say
            return
        trace = "".join(traceback.format_exception(error)) if error else f"where this rank stood:\n{all_stacks()}\n"
        text = (
            f"rank {self.rank} on {socket.gethostname()}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n{alarm.told}\n{trace}"
        )
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            with (self.logs / f"rank_{self.rank}.err").open("a", encoding="utf-8") as file:
                file.write(f"{text}last lines:\n{self.lines.text()}\n\n")
        except OSError as wrong:
            print(f"warning: {self.logs} cannot be written to: {wrong}", file=sys.stderr, flush=True)

    def _outlive_store(self) -> None:
        """The host of the store has ended. This rank may have work left, but whom would it still hear from?"""
        waits_since = time.monotonic()
        while not self.stopped.wait(POLL_SECONDS):
            if not whereabouts(self.main_thread)[0]:
                waits_since = time.monotonic()
            elif time.monotonic() - waits_since > ALONE_SECONDS:
                print(
                    f"error: rank {self.rank} ends: the launcher's store is gone, its host has ended", file=sys.stderr
                )
                self._leave()

    def _say_where(self, hangs: bool) -> None:
        """Publish where this rank stands; the first rank that waits collects and prints, once for a batch."""
        waits, place = whereabouts(self.main_thread)
        batch, seconds = self.beats, time.monotonic() - self.last_beat
        word = f"{batch}|{'waits' if waits else 'works'}|{socket.gethostname()}|{place}"
        self.store.set(f"where/{self.rank}", word)
        if hangs and not waits and self.dumped_at != batch:
            self.dumped_at = batch
            # Past the last lines, which are what the rank said before it stood still.
            print(f"hang: rank {self.rank} stands here:\n{all_stacks()}", file=sys.__stderr__, flush=True)
        # When nobody waits there is nobody to collect: then the late ones speak, a little later.
        alone = hangs and seconds > self.hang_after + 5 * POLL_SECONDS
        if not (waits or alone) or self.said_at == (batch, hangs):
            return
        self.said_at = batch, hangs
        key = f"{'hang' if hangs else 'late'}/{batch}"
        if self.store.compare_set(key, "", str(self.rank)).decode() != str(self.rank):
            return
        if self.stopped.wait(3 * POLL_SECONDS):
            return
        line = late_line({rank: self._word_of(rank, batch) for rank in range(self.world_size)}, seconds)
        if not hangs:
            print(f"late: {line}", file=sys.stderr, flush=True)
        elif self.beats == batch:
            self.survivors.give_alarm(Alarm(self._late_rank(batch), f"hang: {line}"))

    def _late_rank(self, batch: int) -> int:
        """The first rank that the others wait for."""
        words = ((rank, self._word_of(rank, batch)) for rank in range(self.world_size))
        return next((rank for rank, word in words if word is None or word.startswith("works")), self.rank)

    def _word_of(self, rank: int, batch: int) -> str | None:
        """What a rank has published about this batch, or the one before if it has not begun this one."""
        key = f"where/{rank}"
        if not self.store.check([key]):
            return None
        number, _, word = self.store.get(key).decode().partition("|")
        return word if int(number) >= batch - 1 else None

    def tell(self, error: BaseException) -> bool:
        """This rank has raised: let everybody know; whether it is the first."""
        if self.told is None:
            self.told = True
            try:
                self.told = self.report(error)
                self._write_error_file(self.survivors.alarm(), error)
            except RuntimeError:
                pass  # the store went first: nobody can be told
        return self.told

    def end(self) -> None:
        """This rank leaves the run."""
        try:
            with self.speaking:  # the last word; a sign of life after it would make this rank's end a failure
                self.stopped.set()
                self.store.set(f"beat/{self.rank}", "left")
        except RuntimeError:
            pass  # the store went first


class _Beating:
    """Signs of life while the watch itself is busy."""

    def __init__(self, watch: Watch) -> None:
        self.watch, self.ended = watch, threading.Event()
        self.thread = threading.Thread(target=self._run, name="signs of life", daemon=True)

    def _run(self) -> None:
        while not self.ended.wait(POLL_SECONDS):
            self.watch.show_life()

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *unused: Any) -> None:
        self.ended.set()
        self.thread.join()


def is_own(error: BaseException) -> bool:
    """Whether an error is this rank's, and not the consequence of another rank's end."""
    return isinstance(error, (UserError, OSError)) or not OF_OTHERS.search(str(error))


_current: Watch | None = None


def beat() -> None:
    """Tell this rank's watch that the run goes on; nothing without one."""
    if _current is not None:
        _current.beat()


def suspect() -> None:
    """Tell this rank's watch that a launcher may be ending this rank because another one has ended."""
    if _current is not None:
        _current.suspicious = True


@contextmanager
def watched(
    timeout_minutes: float, hang_seconds: float | None = None, logs: Path | None = None
) -> Iterator[Watch | None]:
    """Run the body under a watch, which a launcher's store makes possible (or that there is only one process).

    The first rank to raise says so with its traceback, and its message is in the launcher's summary. Then, with a
    `will`, what the ranks hold is saved. Ranks that fail afterwards, because of it, end without a traceback.
    """
    global _current
    if not has_launcher() and dist.get_world_size() > 1:
        yield None
        return
    with ExitStack() as stack:
        lines = stack.enter_context(listening())
        store = _own_store() if has_launcher() else dist.HashStore()
        current = Watch(
            store, dist.get_rank(), dist.get_world_size(), timeout_minutes, hang_seconds, logs=logs, lines=lines
        )
        _current = current
        current.thread.start()
        try:
            yield current
        except Exception as error:
            _fail(current, error)
            raise
        finally:
            current.end()
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
    """What a rank that raised says and does before it ends."""
    alone = watch.world_size == 1
    says = not isinstance(error, UserError)  # the door prints those
    first = watch.tell(error)
    if first and says and not alone:
        if is_own(error):
            traceback.print_exception(error)
        get_error_handler().record_exception(error)
    watch.over.wait()
    if says and not alone:
        raise SystemExit(1) from None
