"""Runs with faults in them and what they left, for tests/distributed/test_faults.py and benchmarks/faults.py."""

from __future__ import annotations

import json
import pydoc_data.topics
from dataclasses import dataclass, field
from pathlib import Path

from mindspeed_llm.checkpoint.directory import find_newest
from mindspeed_llm.testing.launcher import Job, Launcher

DOOR = Path(__file__).with_name("faulty_door.py")
ITERATIONS = 6
# Packed rows with dropout; six iterations of two rows cross the end of an epoch, twice.
FLAGS = (
    f"--prompt-type chatml --pack --train-iters {ITERATIONS} --global-batch-size 4 --micro-batch-size 1 "
    "--seq-length 96 --eval-iters 0 --progress lines --num-threads 1 --hidden-dropout 0.1 --lr 1e-3"
)


@dataclass(frozen=True)
class Fault:
    """What happens to a run, and what is to come of it.

    Attributes:
        at: after which iteration, or at which stage of saving.
        rank: where.
        flags: more of the command line.
        resumes_at: iteration from which the second start goes on, None for any.
        says: what the log must contain.
        again: the same command is given again by hand, since the first start ends well.
    """

    name: str
    fault: str
    at: str = "3"
    rank: int = 1
    ranks: int = 2
    flags: str = ""
    resumes_at: int | None = None
    says: str = ""
    again: bool = False
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def layout(self) -> tuple[int, str]:
        """Runs of the same layout have the same losses; how and when they save does not matter."""
        words, kept = iter(self.flags.split()), []
        for word in words:
            if word in ("--save-interval", "--hang-timeout"):
                next(words)
            elif word not in ("--async-save", "--auto-resume"):
                kept.append(word)
        return self.ranks, " ".join(kept)


@dataclass(frozen=True)
class Outcome:
    """What a run left.

    Attributes:
        losses: by iteration, of all starts; a loss that came out differently the second time is in `differing`.
        resumed: iterations from which the starts went on.
        lost: iterations that were computed again.
        newest: number of the newest complete checkpoint.
    """

    job: Job
    losses: dict[int, float]
    differing: list[int]
    resumed: list[int]
    lost: int
    newest: int | None
    said: str


def write_rows(path: Path) -> Path:
    """Instructions that fill seven packed rows."""
    topics = pydoc_data.topics.topics
    rows = [{"instruction": n, "input": "", "output": " ".join(topics[n].split()[:8])} for n in sorted(topics)[:14]]
    path.write_text(json.dumps(rows))
    return path


def run_fault(launcher: Launcher, fault: Fault, words: str, out: Path, cache: Path, limit: float = 240.0) -> Outcome:
    """Run a training with a fault in `out`, its log in `out`.log."""
    log = out.with_name(out.name + ".log")
    environment = {
        "MINDSPEED_LLM_CACHE": str(cache),
        "FAULT": fault.fault,
        "FAULT_AT": fault.at,
        "FAULT_RANK": str(fault.rank),
        "FAULT_ONCE": str(out.with_name(out.name + ".happened")),
        **fault.environment,
    }
    command = [str(DOOR), "posttrain", *f"{FLAGS} {words} {fault.flags} --save {out}".split()]
    job = launcher.run(command, ranks=fault.ranks, restarts=1, log=log, environment=environment, limit=limit)
    if fault.again and job.status == 0:
        job = launcher.run(command, ranks=fault.ranks, log=log, environment=environment, limit=limit)
    return outcome(job, out, log)


def outcome(job: Job, out: Path, log: Path) -> Outcome:
    """Read what a run left."""
    losses, differing, resumed, lost, last = {}, [], [], 0, 0
    metrics = out / "metrics.jsonl"
    for line in metrics.read_text().splitlines() if metrics.exists() else ():
        told = json.loads(line)
        if told.get("kind") == "start":
            resumed.append(told["iteration"])
            lost += last - told["iteration"]
            last = told["iteration"]
        elif "lm loss" in told:
            last = told["iteration"]
            if losses.setdefault(last, told["lm loss"]) != told["lm loss"]:
                differing.append(last)
    newest = find_newest(out)
    number = int(newest.name.removeprefix("iter_")) if newest else None
    return Outcome(job, losses, differing, resumed, lost, number, log.read_text(errors="replace"))


def problems(fault: Fault, found: Outcome, undisturbed: dict[int, float]) -> list[str]:
    """What is not as it should be, in words."""
    wrong = []
    if found.job.status:
        told = [line for line in found.said.splitlines() if line.startswith("error")]
        wrong.append(f"status {found.job.starts}: {told[-1] if told else found.said[-500:]}")
    if found.losses != undisturbed or found.differing:
        wrong.append(f"losses {found.losses} differ from {undisturbed} (again: {found.differing})")
    if found.newest != ITERATIONS:
        wrong.append(f"newest checkpoint is {found.newest}")
    if len(found.resumed) != 2:
        wrong.append(f"starts at {found.resumed}")
    elif fault.resumes_at is not None and found.resumed[1] != fault.resumes_at:
        wrong.append(f"went on from {found.resumed[1]}, not {fault.resumes_at}")
    if fault.says not in found.said:
        wrong.append(f"did not say {fault.says!r}")
    if found.job.seconds > 60:
        wrong.append(f"took {found.job.seconds:.0f} s to recover")
    return wrong


def table_line(fault: Fault, found: Outcome) -> str:
    """One line of the table of faults."""
    resumed = found.resumed[1] if len(found.resumed) > 1 else "-"
    return (
        f"{fault.name:<44} {fault.ranks} ranks  resumed at {resumed!s:>2}  lost {found.lost}  "
        f"recovered in {found.job.seconds:4.1f} s"
    )
