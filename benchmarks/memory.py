#!/usr/bin/env python3
"""What each memory feature saves and costs: peak memory and tokens/s of the same training, one feature at a time.

    python benchmarks/memory.py [--rounds 3] [--steps 2] [--only NAME ...] [--quick]
                                [--plot docs/memory.png] [--markdown docs/benchmarks.md] [--cite docs/performance.md]

Every row of memory_rows.py is the training of a Llama-shaped model, or of one with experts, in a process of its own, or
in two that talk over the device's backend; rows take turns over rounds, and compare with a plain row of the same
processes. Memory is the allocator's on a device, of the rank that needs most. On a CPU it is resident memory, where
glibc is told to give freed tensors back; what lies in the file that takes the place of host memory is not counted, as
host memory is not on a device. The first step is watched for its largest tensor of logits: rows that chunk the loss
fail where all logits are ever there. Prints a table to stderr and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import memory_page
from memory_rows import CHUNKED, ROWS, SETTINGS, models

MIB = 2**20
# Tensors of a MiB and more are then returned to the system when they are freed.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(MIB), "MALLOC_TRIM_THRESHOLD_": str(MIB), "MALLOC_TOP_PAD_": "0"}


def train(name: str, directory: str, args: argparse.Namespace) -> dict[str, float]:
    """One row, on this process's rank.

    Returns:
        bytes: `peak` over what the process held before the model was built, `activations` of it over what lies
        between two steps (weights, gradients, optimizer); `seconds` of a step, `loss` of the first, `logit_rows`.
    """
    import torch

    row, setting = ROWS[name], SETTINGS[ROWS[name].setting]
    sequence, threads = args.sequence, max(args.threads // setting.ranks, 1)
    torch.set_num_threads(threads)
    from train import Steps

    from mindspeed_llm import accelerator
    from mindspeed_llm.config.parser import parse
    from mindspeed_llm.plan.plan import resolve
    from mindspeed_llm.training.loop import Progress, TrainingLoop
    from mindspeed_llm.training.run import make_optimizer
    from mindspeed_llm.training.setup import build, start_processes

    samples = args.batch // setting.data_parallel
    words = f"--load {directory} --data-path none --bf16 --lr 1e-4 --lr-decay-style constant --eval-iters 0 "
    words += f"--seq-length {sequence} --global-batch-size {args.batch} --micro-batch-size {samples} "
    words += f"--num-threads {threads} --train-iters 1000000 {setting.flags} {row.flags}"
    parsed = parse("posttrain", words.split())
    plan = resolve(parsed.config, parsed.problems)
    start_processes(plan)
    device = accelerator.current()
    before = memory_now(device)
    model = build(plan)
    optimizer, scheduler = make_optimizer(plan, model, 1_000_000)
    ids = torch.randint(0, 1000, (sequence,), generator=torch.Generator().manual_seed(0)).numpy()
    data = Steps([[[{"input_ids": ids, "labels": ids}] * samples]], args.batch)
    loop = TrainingLoop(plan, model, optimizer, scheduler, data, None, Progress(), 1_000_000, None)
    with LargestLogits(plan.padded_vocab_size // plan.tensor_parallel_size, model.chunks[0].parameters()) as logits:
        first = loop.step()[0].loss
    resting = memory_now(device)
    reset_peak(device)
    begin = time.perf_counter()
    for _ in range(args.steps):
        loop.step()
    device.synchronize()
    seconds = (time.perf_counter() - begin) / args.steps
    peak = peak_memory(device)
    found = {"peak": peak - before, "activations": peak - resting, "seconds": seconds, "loss": float(first)}
    return found | {"logit_rows": logits.rows}


class LargestLogits:
    """Context that notes how many rows of logits a tensor had at most.

    Attributes:
        rows: of a tensor whose last dimension is a vocabulary's.
    """

    def __init__(self, vocabulary: int, parameters: Iterable[Any]) -> None:
        from torch.utils._python_dispatch import TorchDispatchMode

        self.rows = 0
        watch, weights = self, {parameter.untyped_storage()._cdata for parameter in parameters}

        class Watching(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
                result = function(*arguments, **(keywords or {}))
                for tensor in result if isinstance(result, (tuple, list)) else [result]:
                    wide = getattr(tensor, "ndim", 0) >= 2 and tensor.shape[-1] == vocabulary
                    if wide and tensor.untyped_storage()._cdata not in weights:  # a head's weight, turned
                        watch.rows = max(watch.rows, tensor.numel() // vocabulary)
                return result

        self._mode = Watching()

    def __enter__(self) -> LargestLogits:
        self._mode.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._mode.__exit__(*error)


def memory_now(device: Any) -> int:
    """Bytes that the process holds."""
    return device.memory_allocated() or status("VmRSS") - status("RssFile")


def status(name: str) -> int:
    """Bytes of a row of /proc/self/status."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(lines[name].split()[0]) * 1024


def reset_peak(device: Any) -> None:
    """Start measuring the peak."""
    device.reset_peak_memory()
    if device.name == "cpu":
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: Any) -> int:
    """Highest number of bytes since `reset_peak`."""
    if device.name != "cpu":
        return device.peak_memory_allocated()
    return status("VmHWM") - status("RssFile")


def run_row(name: str, directory: str, args: argparse.Namespace) -> dict[str, float]:
    """One row in processes of its own: of each figure the highest of the ranks.

    Raises:
        SystemExit: a rank failed; the others have been ended.
    """
    ranks = SETTINGS[ROWS[name].setting].ranks
    words = ["--row", name, "--directory", directory, "--sequence", str(args.sequence), "--steps", str(args.steps)]
    words += ["--batch", str(args.batch), "--threads", str(args.threads)]
    with socket.create_server(("127.0.0.1", 0)) as free, tempfile.TemporaryDirectory() as scratch:
        port = str(free.getsockname()[1])
        free.close()
        launch = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_PORT": port}
        launch |= {"MASTER_ADDR": "127.0.0.1"}
        processes = []
        for rank in range(ranks):
            own = os.environ | ALLOCATOR | launch | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with open(f"{scratch}/{rank}.out", "w") as out, open(f"{scratch}/{rank}.err", "w") as err:
                processes.append(subprocess.Popen([sys.executable, __file__, *words], env=own, stdout=out, stderr=err))
        failed = wait_for_all(processes)
        if failed is not None:
            raise SystemExit(f"{name}: {Path(f'{scratch}/{failed}.err').read_text()[-2000:]}")
        found = [json.loads(Path(f"{scratch}/{rank}.out").read_text().splitlines()[-1]) for rank in range(ranks)]
    return {key: max(own[key] for own in found) for key in found[0]}


def wait_for_all(processes: list[subprocess.Popen]) -> int | None:
    """Until all have ended, or one has failed: its number; the others, which wait for it, are ended."""
    try:
        while any(process.poll() is None for process in processes):
            if any(process.poll() for process in processes):
                break
            time.sleep(0.05)
        return next((number for number, process in enumerate(processes) if process.poll()), None)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def summary(measured: dict[str, list[dict[str, float]]], tokens: int) -> dict[str, dict[str, Any]]:
    """Medians of each row, and its ratios to the row that it is compared with."""
    middle = {
        name: {key: statistics.median(found[key] for found in rounds) for key in rounds[0]}
        for name, rounds in measured.items()
    }
    rows: dict[str, dict[str, Any]] = {}
    for name, row in middle.items():
        rows[name] = {
            "peak_mib": round(row["peak"] / MIB),
            "activations_mib": round(row["activations"] / MIB),
            "tokens_per_second": round(tokens / row["seconds"]),
            "loss": round(row["loss"], 6),
            "logit_rows": int(row["logit_rows"]),
        }
        if row["logit_rows"] > CHUNKED.get(name, row["logit_rows"]):
            raise SystemExit(f"{name}: {row['logit_rows']} rows of logits were there at once, not {CHUNKED[name]}")
        other = middle.get(ROWS[name].beside)
        if other is not None:
            pairs = zip(measured[ROWS[name].beside], measured[name])
            rows[name]["peak_ratio"] = round(row["peak"] / other["peak"], 3)
            rows[name]["activations_ratio"] = round(row["activations"] / other["activations"], 3)
            rows[name]["speed_ratio"] = round(statistics.median(a["seconds"] / b["seconds"] for a, b in pairs), 3)
    return rows


def measure(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """All rows, in rounds."""
    from mindspeed_llm.checkpoint.toy import make_toy

    measured: dict[str, list[dict[str, float]]] = {name: [] for name in args.only}
    with tempfile.TemporaryDirectory() as scratch:
        there = models(args.layers, args.sequence, args.quick)
        needed = dict.fromkeys(SETTINGS[ROWS[name].setting].model for name in args.only)
        made = {kind: str(make_toy(kind, Path(scratch) / kind, dtype="bfloat16", **there[kind])) for kind in needed}
        for number in range(args.rounds):
            begin = number % len(args.only)
            for name in args.only[begin:] + args.only[:begin]:
                measured[name].append(run_row(name, made[SETTINGS[ROWS[name].setting].model], args))
                peak, seconds = (measured[name][-1][key] for key in ("peak", "seconds"))
                print(f"{name}: {peak / MIB:,.0f} MiB, {seconds:.1f} s a step", file=sys.stderr, flush=True)
    return summary(measured, args.batch * args.sequence)


def possible_rows(chosen: list[str] | None) -> list[str]:
    """The rows that are asked for, or all that have devices enough; says which have not."""
    from mindspeed_llm import accelerator

    device = accelerator.current()
    most = max(setting.ranks for setting in SETTINGS.values()) if device.name == "cpu" else device.device_count()
    names = [name for name, row in ROWS.items() if SETTINGS[row.setting].ranks <= most]
    if left := [name for name in chosen or ROWS if name not in names]:
        print(f"not measured, for want of devices (here {most}): {', '.join(left)}", file=sys.stderr)
    return names if chosen is None else [name for name in chosen if name in names]


def machine(threads: int) -> str:
    """Processor or device, in words."""
    from mindspeed_llm import accelerator

    if accelerator.current().name != "cpu":
        return accelerator.current().model()
    said = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    name = " ".join((said[1] if said else platform.machine()).split()[:2])
    return f"CPU ({name}, {len(os.sched_getaffinity(0))} cores, {threads} threads)"


def parsed_arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=2, help="sequences of a step, one micro-batch of each rank")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of all ranks together")
    parser.add_argument("--only", nargs="+", choices=list(ROWS))
    parser.add_argument("--plot", help="write a picture here")
    parser.add_argument("--markdown", type=Path, help="write the table into this page, in the place of the one there")
    parser.add_argument("--cite", type=Path, help="write the figures of rows into this page, where it links to them")
    parser.add_argument("--quick", action="store_true", help="one round of a tiny model")
    parser.add_argument("--row", choices=list(ROWS), help=argparse.SUPPRESS)
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.batch % 2:
        parser.error(f"--batch: {args.batch} is odd, because two data-parallel ranks share it; legal: even numbers")
    return args


def main() -> None:
    """Measure and print."""
    args = parsed_arguments()
    standard_output, sys.stdout = sys.stdout, sys.stderr
    if args.row:
        found = train(args.row, args.directory, args)
        print(json.dumps(found), file=standard_output)
        return
    import torch

    if args.quick:
        args.rounds, args.sequence, args.layers = 1, 256, 4
    args.only = possible_rows(args.only)
    if not args.only:
        sys.exit("memory: none of these rows can be measured here; legal: rows for as many devices as there are")
    begin = time.monotonic()
    rows = measure(args)
    memory_page.show(rows)
    result = {"benchmark": "memory", "dtype": "bf16", "threads": args.threads, "rounds": args.rounds}
    result |= {"layers": args.layers, "sequence": args.sequence, "batch": args.batch, "rows": rows}
    result |= {"machine": machine(args.threads), "torch": torch.__version__, "minutes": (time.monotonic() - begin) / 60}
    result |= {"load_average": round(os.getloadavg()[0], 2)}
    if args.plot:
        memory_page.chart(rows, args.plot)
    if args.markdown:
        command = f"python benchmarks/memory.py --rounds {args.rounds} --steps {args.steps}"
        memory_page.write_table(args.markdown, result | {"command": command})
    if args.cite:
        memory_page.cite(args.cite, rows)
    print(json.dumps(result), file=standard_output)


if __name__ == "__main__":
    main()
