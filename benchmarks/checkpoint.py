#!/usr/bin/env python3
"""Checkpoints of a ~110M Llama in bf16 with its optimizer: GB/s against `cp` of the same files, stall of training.

    python benchmarks/checkpoint.py [--directory DIR] [--rounds 5] [--steps 6] [--threads 2] [--quick]

Sides take turns; each writes new files, and what is removed is removed outside the time. "flushed" waits until all
bytes are on the disk, which a real save always does; the others end in the page cache, as cp does. The sides that
read find the files in the page cache. Prints one JSON line.

    save, save_flushed          checkpoint directory with manifest, from the live state; without and with fsync
    cp, cp_flushed              `cp` of that directory's files; with fsync of the copies
    load                        into the live state, with all checks but the checksums
    load_verified               the same after comparing all checksums
    stall_in_steps              how long training waits for --async-save, in steps of GLOBAL_BATCH samples
    step_beside_over_alone      how long a step takes while a checkpoint is written, against one alone
    peak_extra_over_state       host memory at its peak during a save and above what was there, against the state
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from lengths import draw_samples
from train import GLOBAL_BATCH, LLAMA_110M, MICRO_BATCH, TINY, Ours, groups

AIMS = {"save_over_cp": 0.8, "save_flushed_over_cp_flushed": 0.8, "load_over_cp": 0.8, "stall_in_steps": 1.0}


class Checkpoints:
    """Saves and loads of one training state.

    Args:
        root: an empty directory on the disk to be measured.
    """

    def __init__(self, ours: Ours, root: Path) -> None:
        from mindspeed_llm.checkpoint.training_state import bytes_to_write, rng_states, training_state

        self.root, self.number = root, 0
        self.state = training_state(ours.model.chunks, ours.optimizer, ours.scheduler, None, rng=rng_states())
        self.num_bytes = bytes_to_write(self.state)
        self.saved = self.save()

    def order(self) -> Any:
        """The next iteration."""
        from mindspeed_llm.checkpoint.train_save import SaveOrder

        self.number += 1
        return SaveOrder(self.root / "saved", self.number, {"format": "torch_dist"})

    def save(self) -> Path:
        """A whole save."""
        from mindspeed_llm.checkpoint.train_save import save_training

        return save_training(self.order(), self.state)

    def save_unflushed(self) -> None:
        """A save that leaves the bytes in the page cache."""
        with mock.patch("os.fsync", lambda descriptor: None):
            self.save()

    def copy(self, flushed: bool) -> None:
        """What cp needs for the same files."""
        target = self.root / "copied"
        subprocess.run(["cp", "-r", "--reflink=never", str(self.saved), str(target)], check=True)
        if flushed:
            for path in target.rglob("*"):
                with path.open("rb") if path.is_file() else open(os.devnull, "rb") as file:
                    if path.is_file():
                        os.fsync(file.fileno())

    def load(self, verified: bool) -> None:
        """Read everything into the live state."""
        from mindspeed_llm.checkpoint.manifest import changed_file
        from mindspeed_llm.checkpoint.train_save import load_training

        if verified:
            assert changed_file(self.saved) is None
        load_training(self.saved, self.state)

    def tidy(self) -> None:
        """Remove what the sides wrote, and let the disk come to rest."""
        shutil.rmtree(self.root / "copied", ignore_errors=True)
        for directory in (self.root / "saved").glob("iter_*"):
            if directory != self.saved:
                shutil.rmtree(directory)
        os.sync()


def seconds_of(sides: dict[str, Callable[[], Any]], between: Callable[[], None], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side in each round, after one round that does not count; `between` is not timed."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, run in sides.items():
            between()
            begin = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - begin)
    between()
    return seconds


def rates(checkpoints: Checkpoints, rounds: int) -> dict[str, Any]:
    """GB/s of all sides and their ratios."""
    sides = {
        "save": checkpoints.save_unflushed,
        "cp": lambda: checkpoints.copy(False),
        "load": lambda: checkpoints.load(False),
        "save_flushed": checkpoints.save,
        "cp_flushed": lambda: checkpoints.copy(True),
        "load_verified": lambda: checkpoints.load(True),
    }
    seconds = seconds_of(sides, checkpoints.tidy, rounds)
    pairs = {
        "save_over_cp": ("cp", "save"),
        "save_flushed_over_cp_flushed": ("cp_flushed", "save_flushed"),
        "load_over_cp": ("cp", "load"),
        "load_verified_over_cp": ("cp", "load_verified"),
    }
    ratio = {k: [slow / fast for slow, fast in zip(seconds[a], seconds[b])] for k, (a, b) in pairs.items()}
    return {
        "gigabytes_per_second": {
            n: round(checkpoints.num_bytes / statistics.median(s) / 1e9, 3) for n, s in seconds.items()
        },
        **{name: round(statistics.median(values), 2) for name, values in ratio.items()},
    }


def stall(ours: Ours, checkpoints: Checkpoints, samples: list, steps: int) -> dict[str, float]:
    """What --async-save costs training."""
    from mindspeed_llm.checkpoint.async_save import AsyncSave

    loop, background = ours.loop([groups(samples, MICRO_BATCH)]), AsyncSave()
    background.reserve(checkpoints.state)

    def step() -> float:
        begin = time.perf_counter()
        loop.step()
        return time.perf_counter() - begin

    step()
    alone, beside, waits = [step() for _ in range(steps)], [], []
    for _ in range(steps):
        begin = time.perf_counter()
        background.start(checkpoints.order(), checkpoints.state)
        waits.append(time.perf_counter() - begin)
        while background.is_busy():
            beside.append(step())
        checkpoints.tidy()
        alone.append(step())
    background.wait()
    each = statistics.median(alone)
    return {
        "seconds_per_step": round(each, 3),
        "stall_seconds": round(statistics.median(waits), 3),
        "stall_in_steps": round(statistics.median(waits) / each, 3),
        "step_beside_over_alone": round(statistics.median(beside) / each, 2) if beside else None,
    }


def peak_extra(run: Callable[[], Any]) -> int:
    """Bytes of resident memory at the peak of a call above what was resident before it; 0 where it cannot be told."""
    import psutil

    clear = Path("/proc/self/clear_refs")
    try:
        clear.write_text("5")
    except OSError:
        return 0
    before = psutil.Process().memory_info().rss
    run()
    lines = Path("/proc/self/status").read_text().splitlines()
    return max(0, 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) - before)


def memory(checkpoints: Checkpoints) -> dict[str, float]:
    """Peaks against the state's bytes."""
    from mindspeed_llm.checkpoint.async_save import AsyncSave

    def beside() -> None:
        background = AsyncSave()
        background.start(checkpoints.order(), checkpoints.state)
        background.wait()

    sides = {"save": checkpoints.save, "load": lambda: checkpoints.load(False), "async_save": beside}
    return {name: round(peak_extra(run) / checkpoints.num_bytes, 3) for name, run in sides.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", help="on the disk to be measured; default: the system's for temporary files")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="training steps alone, and saves beside training")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one round of a tiny model")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.steps = 1, 1
    warnings.filterwarnings("ignore")
    import torch

    torch.set_num_threads(args.threads)
    from mindspeed_llm.checkpoint.toy import make_toy

    standard_output, sys.stdout = sys.stdout, sys.stderr
    model = TINY if args.quick else LLAMA_110M
    samples = draw_samples(GLOBAL_BATCH, model["vocab_size"], args.seed)
    with tempfile.TemporaryDirectory(dir=args.directory) as scratch:
        directory = str(make_toy("llama", Path(scratch) / "model", dtype="bfloat16", **model))
        ours = Ours(directory, "full", args.threads)
        ours.loop([groups(samples, MICRO_BATCH)]).step()
        checkpoints = Checkpoints(ours, Path(scratch) / "checkpoints")
        result: dict[str, Any] = {"benchmark": "checkpoint", "dtype": "bf16", "threads": args.threads}
        result |= {"rounds": args.rounds, "gigabytes": round(checkpoints.num_bytes / 1e9, 3), "aims": AIMS}
        result |= rates(checkpoints, args.rounds)
        result |= stall(ours, checkpoints, samples, args.steps)
        result["peak_extra_over_state"] = memory(checkpoints)
    result["load_average"] = round(os.getloadavg()[0], 2)
    print(json.dumps(result), file=standard_output)


if __name__ == "__main__":
    main()
