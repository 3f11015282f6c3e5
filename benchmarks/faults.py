#!/usr/bin/env python3
"""The long sweep of faults: every stage of saving, every rank, random iterations, several layouts; and a lost host.

    python benchmarks/faults.py [--rounds 1] [--seed 0] [--only NAME] [--quick] [--without-torchrun]

Each run has dropout on packed rows and is compared bitwise with an undisturbed one of its layout. Prints the table of
faults to stderr and one JSON line: how many went wrong, which, the longest recovery and the most iterations lost.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from mindspeed_llm.checkpoint.directory import STAGES
from mindspeed_llm.testing.faults import (
    DOOR,
    FLAGS,
    ITERATIONS,
    Fault,
    Outcome,
    problems,
    run_fault,
    table_line,
    write_rows,
)

LAYOUTS = {
    "alone": (1, ""),
    "DP2": (2, ""),
    "DP2, spread": (2, "--use-distributed-optimizer"),
    "DP2, adapters": (2, "--lora-r 4 --lora-alpha 8"),
    "DP2, bf16": (2, "--bf16"),
    "TP2": (2, "--tensor-model-parallel-size 2"),
    "PP2": (2, "--pipeline-model-parallel-size 2"),
    "CP2": (2, "--context-parallel-size 2"),
    "TP2 DP2": (4, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "PP2 DP2": (4, "--pipeline-model-parallel-size 2"),
}
# Layouts in which every part of the state is on another rank too.
REPLICATED = ("DP2", "DP2, adapters", "DP2, bf16", "CP2", "TP2 DP2", "PP2 DP2")


def faults(rounds: int, draw: random.Random) -> Iterator[Fault]:
    """The sweep."""
    for _ in range(rounds):
        for layout, (ranks, flags) in LAYOUTS.items():
            rank, at = draw.randrange(ranks), draw.randrange(1, ITERATIONS)
            dying = at if layout in REPLICATED else None
            every = "" if layout in REPLICATED else "--save-interval 1"
            yield Fault(f"{layout}: killed", "kill", str(at), rank, ranks, f"{flags} {every}", dying)
            if dying:
                # Rank 0: the log is the last rank's, and so are the losses that are compared.
                words = (str(at), 0, ranks, flags, at + 1)
                yield Fault(f"{layout}: killed before its update", "kill_before_update", *words)
            yield Fault(f"{layout}: raises", "raises", str(at), rank, ranks, flags, at)
            if ranks > 1:
                yield Fault(f"{layout}: sleeps", "sleeps", str(at), rank, ranks, f"{flags} --hang-timeout 5", at)
            for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
                told = {"FAULT_SIGNAL": name}
                words = f"{flags} --auto-resume"
                yield Fault(f"{layout}: {name}", "asked_to_stop", str(at), rank, ranks, words, at + 1, again=True,
                            environment=told)  # fmt: skip
        for stage in STAGES:
            for layout in ("alone", "DP2", "TP2 DP2"):
                for way in ("", "--async-save"):
                    ranks, flags = LAYOUTS[layout]
                    # All ranks pass the stages of writing, the first alone the others.
                    rank = draw.randrange(ranks) if stage in ("writing", "written") else 0
                    words = f"{flags} --save-interval 2 {way}"
                    yield Fault(f"{layout}: killed at {stage} {way}", "kill_in_save", f"{stage}:2", rank, ranks, words)


def lose_a_host(words: str, directory: Path) -> dict[str, object]:
    """Two launchers of one process each, `--nnodes 1:2`; one is killed with its process and the other goes on alone."""
    out, port = directory / "hosts", 20000 + os.getpid() % 20000
    launch = (
        "-m torch.distributed.run --nnodes 1:2 --nproc-per-node 1 --rdzv-backend c10d --max-restarts 1 "
        f"--rdzv-endpoint localhost:{port} --rdzv-id {port} --rdzv-conf last_call_timeout=5"
    )
    flags = FLAGS.replace(f"--train-iters {ITERATIONS}", "--train-iters 200") + " --auto-resume --log-interval 10"
    command = [sys.executable, *f"{launch} {DOOR} posttrain {flags} {words} --save {out}".split()]
    environment = {**os.environ, "MINDSPEED_LLM_DEVICE": "cpu", "MINDSPEED_LLM_CACHE": str(directory / "cache")}
    logs = [(directory / f"host{n}.log").open("w+") for n in range(2)]
    hosts = []
    for log in logs:
        hosts.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True))
        time.sleep(1.0)
    deadline = time.monotonic() + 240
    while "iteration       20/" not in "".join(Path(log.name).read_text() for log in logs):
        if time.monotonic() > deadline:
            raise TimeoutError(f"two hosts did not train; see {directory}")
        time.sleep(0.2)
    children = Path(f"/proc/{hosts[1].pid}/task/{hosts[1].pid}/children").read_text().split()
    for pid in (hosts[1].pid, *map(int, children)):
        os.kill(pid, signal.SIGKILL)
    hosts[1].wait()
    killed_at = time.monotonic()
    before, goes_on = Path(logs[0].name).read_text(), None
    while hosts[0].poll() is None and time.monotonic() < deadline:
        if goes_on is None and "iteration" in Path(logs[0].name).read_text()[len(before) :].partition("resuming")[2]:
            goes_on = time.monotonic() - killed_at
        time.sleep(0.2)
    hosts[0].kill()
    said = Path(logs[0].name).read_text()
    return {"status": hosts[0].wait(), "seconds": goes_on, "dying_breath": "saved iteration" in said}


def main() -> int:
    """Run the sweep; 1 if anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="faults whose name contains this")
    parser.add_argument("--quick", action="store_true", help="the first fault of two layouts")
    parser.add_argument("--without-torchrun", action="store_true", help="leave out the lost host")
    asked = parser.parse_args()
    from mindspeed_llm.checkpoint.toy import make_toy
    from mindspeed_llm.testing.launcher import Launcher

    sweep = [fault for fault in faults(asked.rounds, random.Random(asked.seed)) if asked.only in fault.name]
    if asked.quick:
        sweep = [fault for fault in sweep if fault.name in ("alone: killed", "DP2: killed")]
    wrong, found, undisturbed = {}, [], {}
    with tempfile.TemporaryDirectory() as folder, Launcher() as launcher:
        directory = Path(folder)
        words = f"--load {make_toy('llama', directory / 'toy')} --data-path {write_rows(directory / 'rows.json')}"
        for number, fault in enumerate(sweep):
            if fault.layout not in undisturbed:
                quiet = Fault("nothing", "", ranks=fault.ranks, flags=fault.layout[1])
                out = directory / f"quiet{number}"
                outcome = run_fault(launcher, quiet, words, out, directory / "cache")
                if outcome.job.status:
                    raise RuntimeError(f"{fault.layout} fails without a fault: {outcome.said[-3000:]}")
                undisturbed[fault.layout] = outcome.losses
            outcome = run_fault(launcher, fault, words, directory / f"run{number}", directory / "cache")
            found.append(outcome)
            problem = problems(fault, outcome, undisturbed[fault.layout])
            print(table_line(fault, outcome), *problem, sep="  ", file=sys.stderr, flush=True)
            if problem:
                wrong[fault.name] = problem
        lost_host = None if asked.without_torchrun or asked.quick else lose_a_host(words, directory)
    print(json.dumps(summary(found, wrong) | {"lost_host": lost_host}))
    return int(bool(wrong))


def summary(found: list[Outcome], wrong: dict[str, list[str]]) -> dict[str, object]:
    """What is printed of the sweep."""
    return {
        "faults": len(found),
        "wrong": wrong,
        "longest_recovery_seconds": round(max(outcome.job.seconds for outcome in found), 1),
        "most_iterations_lost": max(outcome.lost for outcome in found),
    }


if __name__ == "__main__":
    if status := main():
        sys.exit(status)
