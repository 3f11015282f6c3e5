#!/usr/bin/env python3
"""What each memory feature saves and costs: peak memory and tokens/s of the same training, one feature at a time.

    python benchmarks/memory.py [--rounds 3] [--sequence 2048] [--layers 8] [--only NAME ...] [--chart FILE] [--quick]

Every row is the training of a Llama-shaped model in a process of its own, rows take turns over rounds. Memory is the
allocator's on a device, resident memory on a CPU, where glibc is told to give freed tensors back. Prints a table to
stderr and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
SWAPPED = "--swap-attention --swap-modules input_norm,self_attention,post_attention_norm,mlp --swap-budget 64"
LORA = "--lora-r 16 --lora-target-modules all-linear"
# Row -> (flags, the row that it is compared with).
ROWS: dict[str, tuple[str, str]] = {
    "pre-training": ("", ""),
    "loss from all logits": ("--no-cross-entropy-loss-fusion", "pre-training"),
    "recompute norms": ("--recompute-norm", "pre-training"),
    "recompute activations": ("--recompute-activation-function", "pre-training"),
    "both": ("--recompute-norm --recompute-activation-function", "pre-training"),
    "recompute layers": (FULL, "pre-training"),
    "swap": (SWAPPED, "pre-training"),
    "swap, recompute both": (f"{SWAPPED} --recompute-norm --recompute-activation-function", "pre-training"),
    "recompute layers, swap inputs": (f"{FULL} --swap-layer-input --swap-budget 64", "pre-training"),
    "LoRA": (LORA, "pre-training"),
    "LoRA, swap": (f"{LORA} {SWAPPED}", "LoRA"),
    "QLoRA": (f"{LORA} --qlora", "LoRA"),
}
WIDE = {"hidden_size": 1024, "intermediate_size": 3584, "num_attention_heads": 16, "num_key_value_heads": 4}
WIDE |= {"head_dim": 64, "vocab_size": 32000, "initializer_range": 0.02}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY |= {"head_dim": 16, "vocab_size": 1000}
RATIOS = ("peak_ratio", "activations_ratio")
MIB = 2**20
# Tensors of a MiB and more are then returned to the system when they are freed.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(MIB), "MALLOC_TRIM_THRESHOLD_": str(MIB), "MALLOC_TOP_PAD_": "0"}
WARM_STEPS = 3


def train(directory: str, flags: str, sequence: int, steps: int, threads: int) -> dict[str, float]:
    """One row, in this process.

    Returns:
        bytes: `peak` over what the process held before the model was built, `activations` of it over what lies
        between two steps (weights, gradients, optimizer); `seconds` of a step, `loss` of the first.
    """
    import torch

    torch.set_num_threads(threads)
    import train as training
    from train import Steps

    from mindspeed_llm import accelerator
    from mindspeed_llm.config.parser import parse
    from mindspeed_llm.plan.plan import resolve
    from mindspeed_llm.training.loop import Progress, TrainingLoop
    from mindspeed_llm.training.run import make_optimizer
    from mindspeed_llm.training.setup import build, start_processes

    training.GLOBAL_BATCH = 1
    words = f"--load {directory} --data-path none --bf16 --lr 1e-4 --lr-decay-style constant --eval-iters 0 "
    words += f"--seq-length {sequence} --global-batch-size 1 --micro-batch-size 1 --num-threads {threads} "
    words += f"--train-iters 1000000 {flags}"
    parsed = parse("posttrain", words.split())
    plan = resolve(parsed.config, parsed.problems)
    start_processes(plan)
    device = accelerator.current()
    before = memory_now(device)
    model = build(plan)
    optimizer, scheduler = make_optimizer(plan, model, 1_000_000)
    ids = torch.randint(0, 1000, (sequence,), generator=torch.Generator().manual_seed(0)).numpy()
    data = Steps([[[{"input_ids": ids, "labels": ids}]]])
    loop = TrainingLoop(plan, model, optimizer, scheduler, data, None, Progress(), 1_000_000, None)
    first = loop.step()[0].loss
    for _ in range(WARM_STEPS - 1):  # swapping measures how much hides
        loop.step()
    resting = memory_now(device)
    reset_peak(device)
    begin = time.perf_counter()
    for _ in range(steps):
        loop.step()
    device.synchronize()
    seconds = (time.perf_counter() - begin) / steps
    peak = peak_memory(device)
    return {"peak": peak - before, "activations": peak - resting, "seconds": seconds, "loss": float(first)}


def memory_now(device: Any) -> int:
    """Bytes that the process holds."""
    return device.memory_allocated() or device.resident_memory()


def reset_peak(device: Any) -> None:
    """Start measuring the peak."""
    device.reset_peak_memory()
    if device.name == "cpu":
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: Any) -> int:
    """Highest number of bytes since `reset_peak`."""
    if device.name != "cpu":
        return device.peak_memory_allocated()
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(lines["VmHWM"].split()[0]) * 1024


def run_row(name: str, directory: str, args: argparse.Namespace) -> dict[str, float]:
    """One row in a process of its own."""
    words = ["--row", name, "--directory", directory, "--sequence", str(args.sequence), "--steps", str(args.steps)]
    found = subprocess.run(
        [sys.executable, __file__, *words, "--threads", str(args.threads)],
        env=os.environ | ALLOCATOR,
        capture_output=True,
        text=True,
    )
    if found.returncode:
        raise SystemExit(f"{name}: {found.stderr[-2000:]}")
    return json.loads(found.stdout.splitlines()[-1])


def summary(measured: dict[str, list[dict[str, float]]], tokens: int) -> dict[str, dict[str, Any]]:
    """Medians of each row, and its ratios to the row that it is compared with."""
    middle = {
        name: {key: statistics.median(found[key] for found in rounds) for key in rounds[0]}
        for name, rounds in measured.items()
    }
    rows: dict[str, dict[str, Any]] = {}
    for name, row in middle.items():
        other = middle.get(ROWS[name][1])
        rows[name] = {
            "peak_mib": round(row["peak"] / MIB),
            "activations_mib": round(row["activations"] / MIB),
            "tokens_per_second": round(tokens / row["seconds"], 1),
            "loss": round(row["loss"], 6),
        }
        if other is not None:
            pairs = zip(measured[ROWS[name][1]], measured[name])
            rows[name]["peak_ratio"] = round(row["peak"] / other["peak"], 3)
            rows[name]["activations_ratio"] = round(row["activations"] / other["activations"], 3)
            rows[name]["speed_ratio"] = round(statistics.median(a["seconds"] / b["seconds"] for a, b in pairs), 3)
    return rows


def show(rows: dict[str, dict[str, Any]]) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("feature", "beside", "peak MiB", "change", "activations MiB", "change", "tokens/s", "speed", box=None)
    for name, row in rows.items():
        changes = [f"{100 * (row[key] - 1):+.0f} %" if key in row else "" for key in RATIOS]
        speed = f"{row['speed_ratio']:.2f}x" if "speed_ratio" in row else ""
        table.add_row(
            name, ROWS[name][1], str(row["peak_mib"]), changes[0], str(row["activations_mib"]), changes[1],
            str(row["tokens_per_second"]), speed,
        )  # fmt: skip
    Console(stderr=True, width=110).print(table)


def chart(rows: dict[str, dict[str, Any]], path: str) -> None:
    """Draw peak memory as bars with the speed beside them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.4 * len(rows) + 1.2))
    names = list(rows)[::-1]
    axes.barh(names, [rows[name]["peak_mib"] for name in names], color="#c6d3e6", label="weights, gradients, optimizer")
    activations = [rows[name]["activations_mib"] for name in names]
    axes.barh(names, activations, color="#4c78a8", label="activations and temporary tensors")
    for place, name in enumerate(names):
        speed = f", {rows[name]['speed_ratio']:.2f}x speed" if "speed_ratio" in rows[name] else ""
        text = f" {rows[name]['activations_mib']} of {rows[name]['peak_mib']} MiB{speed}"
        axes.text(rows[name]["peak_mib"], place, text, va="center", fontsize=8)
    axes.legend(fontsize=8, loc="lower right")
    axes.set_xlim(0, 1.6 * max(row["peak_mib"] for row in rows.values()))
    axes.set_xlabel("highest memory of a training step, MiB")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--chart", help="write a picture here")
    parser.add_argument("--quick", action="store_true", help="one round of a tiny model")
    parser.add_argument("--row", choices=list(ROWS), help=argparse.SUPPRESS)
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    args = parser.parse_args()
    standard_output, sys.stdout = sys.stdout, sys.stderr
    if args.row:
        found = train(args.directory, ROWS[args.row][0], args.sequence, args.steps, args.threads)
        print(json.dumps(found), file=standard_output)
        return
    from mindspeed_llm.checkpoint.toy import make_toy

    if args.quick:
        args.rounds, args.sequence, args.layers = 1, 256, 4
    sizes = (TINY if args.quick else WIDE) | {"num_hidden_layers": args.layers}
    sizes |= {"max_position_embeddings": args.sequence}
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in args.only}
    with tempfile.TemporaryDirectory() as scratch:
        directory = str(make_toy("llama", scratch, dtype="bfloat16", **sizes))
        for number in range(args.rounds):
            for name in args.only[number % len(args.only) :] + args.only[: number % len(args.only)]:
                measured[name].append(run_row(name, directory, args))
    rows = summary(measured, args.sequence)
    show(rows)
    if args.chart:
        chart(rows, args.chart)
    result = {"benchmark": "memory", "dtype": "bf16", "threads": args.threads, "rounds": args.rounds}
    result |= {"layers": args.layers, "sequence": args.sequence, "rows": rows}
    print(json.dumps(result | {"load_average": round(os.getloadavg()[0], 2)}), file=standard_output)


if __name__ == "__main__":
    main()
