"""After a failure: who is left, what they agree to save, and the words that end the log.

No collective is used, since a rank that is gone would break it: ranks read and write the launcher's store. One of them,
whoever is first, is the judge. It waits until every rank has said which iteration it finished or is known to be gone,
decides what can be saved, and completes it when those who write have said that they are done. If the judge ends too,
nothing is completed and the checkpoint before stays what a resume finds.
"""

from __future__ import annotations

import functools
import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

# A rank without a sign of life for this long, while the others answer, is gone.
GONE_SECONDS = 4.0
# A launcher gives the ranks that are left 30 s (torchrun's default) after one has ended; all together stays below.
ANSWER_SECONDS, UPDATE_SECONDS, WRITE_SECONDS = 12.0, 5.0, 240.0
POLL_SECONDS = 0.1
ALARM = "alarm"


@dataclass(frozen=True)
class Alarm:
    """What made a rank believe that the run has failed.

    Attributes:
        rank: the failing rank as far as known; another one may turn out to be the cause.
        told: one line.
        own: the rank speaks of itself; otherwise `told` may be the consequence of another rank's end.
        savable: what the ranks hold is sound and can be saved.
    """

    rank: int
    told: str
    own: bool = True
    savable: bool = True


class LastWill(Protocol):
    """What the ranks that are left can save, as the training loop provides it. No method uses a collective."""

    def freeze(self, seconds: float) -> int | None:
        """Keep the finished iteration as it is until the process ends.

        Returns:
            Its number; None in the middle of an update that does not end within `seconds`.
        """

    def decide(self, finished: Mapping[int, int | None]) -> dict[str, Any]:
        """What to save, from the iterations that the ranks that are left have finished.

        Returns:
            {"reason": why nothing is} or {"iteration": n, "holders": ranks whose parts make a whole}.
        """

    def prepare(self, decision: Mapping[str, Any]) -> None:
        """Make room for what all write; called by the judge before anybody writes."""

    def write(self, decision: Mapping[str, Any]) -> None:
        """Write what is to come from this rank: of a holder, or of `decision["judge"]`, or of both in one."""

    def complete(self, decision: Mapping[str, Any]) -> str:
        """Make a checkpoint of all shares; its directory."""


@dataclass(frozen=True)
class Answer:
    """One rank's answer to the alarm."""

    host: str
    process: int
    iteration: int | None


def sign_of_life(count: int) -> str:
    """A text that changes while a rank lives, and says where: "count|host|process|boot and namespace of processes"."""
    return f"{count}|{socket.gethostname()}|{os.getpid()}|{_where_processes_count()}"


def has_ended(sign: str) -> bool:
    """Whether the process that gave a sign of life was here, where it can be looked for, and is not any more."""
    _, _, process, where = (*sign.split("|"), "", "", "")[:4]
    if not where or where != _where_processes_count():
        return False
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in "ZX"  # ended, and its parent has not asked for the status yet


@functools.cache
def _where_processes_count() -> str:
    """This boot of this host, and this namespace of process numbers; empty where the system does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


class Survivors:
    """One rank's part in what follows an alarm.

    Args:
        store: any torch.distributed store for the ranks of this run alone.
        lines_of: the last lines that a rank is known to have printed.
    """

    def __init__(self, store: Any, rank: int, world_size: int, lines_of: Callable[[int], str]) -> None:
        self.store, self.rank, self.world_size, self.lines_of = store, rank, world_size, lines_of

    def alarm(self) -> Alarm | None:
        """The first alarm that any rank gave."""
        return Alarm(**json.loads(self.store.get(ALARM))) if self.store.check([ALARM]) else None

    def give_alarm(self, alarm: Alarm) -> bool:
        """Tell everybody; whether nobody was earlier."""
        text = json.dumps(asdict(alarm))
        return self.store.compare_set(ALARM, "", text).decode() == text

    def gather(self, will: LastWill | None) -> str:
        """Answer the alarm, save what can be saved, and find the words for it (of the judge; others get none)."""
        alarm = self.alarm()
        iteration = will.freeze(UPDATE_SECONDS) if will is not None else None
        own = Answer(socket.gethostname(), os.getpid(), iteration)
        self.store.set(f"answer/{self.rank}", json.dumps(asdict(own)))
        if self.store.compare_set("judge", "", str(self.rank)).decode() != str(self.rank):
            self._follow(will)
            return ""
        answers = self._answers()
        saved = self._save(alarm, answers, will)
        words = self.last_words(alarm, answers, saved)
        self.store.set("closed", "1")
        return words

    def _answers(self) -> dict[int, Answer]:
        """By rank; those who answered in time."""
        beats, changed_at = {}, {}
        start, found = time.monotonic(), {}
        while len(found) < self.world_size and time.monotonic() - start < ANSWER_SECONDS:
            now = time.monotonic()
            waited = False
            for rank in range(self.world_size):
                if rank in found:
                    continue
                if self.store.check([f"answer/{rank}"]):
                    found[rank] = Answer(**json.loads(self.store.get(f"answer/{rank}")))
                    continue
                beat = self.beat_of(rank)
                if beats.get(rank) != beat:
                    beats[rank], changed_at[rank] = beat, now
                waited |= now - changed_at.get(rank, start) < GONE_SECONDS and not has_ended(beat)
            if not waited:
                break
            time.sleep(POLL_SECONDS)
        return found

    def beat_of(self, rank: int) -> str:
        """A rank's last sign of life, see `sign_of_life`."""
        return self.store.get(f"beat/{rank}").decode() if self.store.check([f"beat/{rank}"]) else ""

    def _save(self, alarm: Alarm, answers: Mapping[int, Answer], will: LastWill | None) -> str:
        """What became of the state, in words; the ranks that write are told, and waited for."""
        decision: dict[str, Any]
        if not alarm.savable:
            decision = {"reason": ""}
        elif will is None:
            decision = {"reason": "nothing is saved, because --save is not given"}
        else:
            decision = will.decide({rank: answer.iteration for rank, answer in answers.items()})
        if "reason" in decision:
            self.store.set("decision", json.dumps(decision))
            return decision["reason"]
        decision["judge"] = self.rank
        try:
            will.prepare(decision)
            self.store.set("decision", json.dumps(decision))
            self._write(decision, will)
            for rank in decision["holders"]:
                self._wait_for(f"wrote/{rank}", WRITE_SECONDS)
                if problem := self.store.get(f"wrote/{rank}").decode():
                    raise RuntimeError(f"rank {rank}: {problem}")
            return f"saved iteration {decision['iteration']} from the ranks that are left to {will.complete(decision)}"
        except Exception as wrong:
            return f"iteration {decision['iteration']} is not saved, because {one_line(wrong)}"

    def _write(self, decision: Mapping[str, Any], will: LastWill) -> None:
        """Write this rank's share and say so, or why not."""
        problem = ""
        try:
            will.write(decision)
        except Exception as wrong:
            problem = one_line(wrong)
        self.store.set(f"wrote/{self.rank}", problem)

    def _follow(self, will: LastWill | None) -> None:
        """Do as the judge decides."""
        self._wait_for("decision", ANSWER_SECONDS + UPDATE_SECONDS)
        decision = json.loads(self.store.get("decision"))
        if will is not None and self.rank in decision.get("holders", ()):
            self._write(decision, will)
        self._wait_for("closed", UPDATE_SECONDS if "reason" in decision else WRITE_SECONDS)

    def _wait_for(self, key: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self.store.check([key]):
            if time.monotonic() > deadline:
                raise TimeoutError(f"nobody has said {key!r} within {seconds:.0f} s")
            time.sleep(POLL_SECONDS)

    def last_words(self, alarm: Alarm, answers: Mapping[int, Answer], saved: str) -> str:
        """First failing rank, host and message, its last lines, and what was saved."""
        gone = sorted(set(range(self.world_size)) - set(answers))
        if not alarm.savable:
            return ""  # a refusal: the door of the rank says it
        rank, told = alarm.rank, alarm.told
        if gone and not alarm.own:
            rank = gone[0]
            more = f" (and rank {', '.join(map(str, gone[1:8]))})" if gone[1:] else ""
            _, host, process, *_ = (self.beat_of(rank) or "|unknown host|unknown").split("|")
            told = f"rank {rank} on {host} failed first{more}: its process {process} is gone: killed, or its host ended"
        lines = "".join(f"  rank {rank} | {line}\n" for line in self.lines_of(rank).splitlines())
        heading = f"error: the last lines of rank {rank}:\n" if lines else ""
        return f"error: {told}\n{heading}{lines}" + (f"error: {saved}\n" if saved else "")


def one_line(error: BaseException) -> str:
    """Type and message of an error; a UserError is its message alone."""
    from mindspeed_llm.errors import UserError

    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
