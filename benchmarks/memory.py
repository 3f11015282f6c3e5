#!/usr/bin/env python3
"""What each memory feature saves and costs: peak memory and tokens/s of the same training, one feature at a time.

    python benchmarks/memory.py [--rounds 3] [--sequence 2048] [--layers 8] [--only NAME ...] [--chart FILE] [--quick]

Every row is the training of a Llama-shaped model, or of one with experts, in a process of its own; rows take turns over
rounds. Memory is the allocator's on a device. On a CPU it is resident memory, where glibc is told to give freed tensors
back; what lies in the file that takes the place of host memory is not counted, as host memory is not on a device.
The first step is watched for its largest tensor of logits: rows that chunk the loss fail where all logits are ever
there. Prints a table to stderr and one JSON line.
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
MOE = "experts"
# Row -> (flags, the row that it is compared with). Names that begin with MOE are of the model with experts.
ROWS: dict[str, tuple[str, str]] = {
    "pre-training": ("", ""),
    "loss from all logits": ("--no-cross-entropy-loss-fusion", "pre-training"),
    "loss in chunks": ("--loss-compute-mode chunk --loss-chunk-size 256", "pre-training"),
    "recompute norms": ("--recompute-norm", "pre-training"),
    "recompute activations": ("--recompute-activation-function", "pre-training"),
    "both": ("--recompute-norm --recompute-activation-function", "pre-training"),
    "recompute layers": (FULL, "pre-training"),
    "swap": (SWAPPED, "pre-training"),
    "swap, recompute both": (f"{SWAPPED} --recompute-norm --recompute-activation-function", "pre-training"),
    "recompute layers, swap inputs": (f"{FULL} --swap-layer-input --swap-budget 64", "pre-training"),
    "moments in bf16": ("--o2-optimizer", "pre-training"),
    "weights are halves of masters": ("--reuse-fp32-param", "pre-training"),
    "swap optimizer": ("--swap-optimizer", "pre-training"),
    "LoRA": (LORA, "pre-training"),
    "LoRA, swap": (f"{LORA} {SWAPPED}", "LoRA"),
    "QLoRA": (f"{LORA} --qlora", "LoRA"),
    MOE: ("", ""),
    f"{MOE}, recompute activations": ("--recompute-activation-function", MOE),
    f"{MOE}, recompute them (level0)": ("--moe-zero-memory level0", MOE),
    f"{MOE}, recompute the part (level1)": ("--moe-zero-memory level1", MOE),
    f"{MOE}, swap": (SWAPPED, MOE),
}
# Rows that never have all logits, and how many they may have.
CHUNKED = {"loss in chunks": 256}
# Memory of tokens in proportion to that of weights as in an 8B model with some 16 thousand tokens on 8 devices.
WIDE = {"hidden_size": 512, "intermediate_size": 1792, "num_attention_heads": 8, "num_key_value_heads": 4}
WIDE |= {"head_dim": 64, "vocab_size": 16000, "initializer_range": 0.02}
EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY |= {"head_dim": 16, "vocab_size": 1000}
RATIOS = ("peak_ratio", "activations_ratio")
MIB = 2**20
# Tensors of a MiB and more are then returned to the system when they are freed.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(MIB), "MALLOC_TRIM_THRESHOLD_": str(MIB), "MALLOC_TOP_PAD_": "0"}


def train(directory: str, flags: str, args: argparse.Namespace) -> dict[str, float]:
    """One row, in this process.

    Returns:
        bytes: `peak` over what the process held before the model was built, `activations` of it over what lies
        between two steps (weights, gradients, optimizer); `seconds` of a step, `loss` of the first, `logit_rows`.
    """
    import torch

    sequence, threads = args.sequence, args.threads
    torch.set_num_threads(threads)
    from train import Steps

    from mindspeed_llm import accelerator
    from mindspeed_llm.config.parser import parse
    from mindspeed_llm.plan.plan import resolve
    from mindspeed_llm.training.loop import Progress, TrainingLoop
    from mindspeed_llm.training.run import make_optimizer
    from mindspeed_llm.training.setup import build, start_processes

    words = f"--load {directory} --data-path none --bf16 --lr 1e-4 --lr-decay-style constant --eval-iters 0 "
    words += f"--seq-length {sequence} --global-batch-size {args.batch} --micro-batch-size {args.batch} "
    words += f"--num-threads {threads} "
    words += f"--train-iters 1000000 {flags}"
    parsed = parse("posttrain", words.split())
    plan = resolve(parsed.config, parsed.problems)
    start_processes(plan)
    device = accelerator.current()
    before = memory_now(device)
    model = build(plan)
    optimizer, scheduler = make_optimizer(plan, model, 1_000_000)
    ids = torch.randint(0, 1000, (sequence,), generator=torch.Generator().manual_seed(0)).numpy()
    data = Steps([[[{"input_ids": ids, "labels": ids}] * args.batch]], args.batch)
    loop = TrainingLoop(plan, model, optimizer, scheduler, data, None, Progress(), 1_000_000, None)
    with LargestLogits(plan.padded_vocab_size, list(model.chunks[0].parameters())) as logits:
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

    def __init__(self, vocabulary: int, parameters: list[Any]) -> None:
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
    """One row in a process of its own."""
    words = ["--row", name, "--directory", directory, "--sequence", str(args.sequence), "--steps", str(args.steps)]
    words += ["--batch", str(args.batch)]
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
            "logit_rows": int(row["logit_rows"]),
        }
        if row["logit_rows"] > CHUNKED.get(name, row["logit_rows"]):
            raise SystemExit(f"{name}: {row['logit_rows']} rows of logits were there at once, not {CHUNKED[name]}")
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


# Okabe and Ito's colours, which the colour-blind tell apart; on white, which both themes of a README show.
STATE_COLOUR, ACTIVATION_COLOUR, BASE_COLOUR = "#56B4E9", "#E69F00", "#000000"


def chart(rows: dict[str, dict[str, Any]], path: str) -> None:
    """Draw peak memory as bars below the one they are compared with, and what each changed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 0.36 * len(rows) + 1.2), facecolor="white")
    groups = list(dict.fromkeys(ROWS[name][1] or name for name in rows))
    names = [name for group in groups for name in rows if name == group or ROWS[name][1] == group]
    places = {name: -number - 0.6 * groups.index(ROWS[name][1] or name) for number, name in enumerate(names)}
    for name, place in places.items():
        row = rows[name]
        state, saved = row["peak_mib"] - row["activations_mib"], row["activations_mib"]
        axes.barh(place, state, color=STATE_COLOUR, height=0.72)
        axes.barh(place, saved, left=state, color=ACTIVATION_COLOUR, height=0.72)
        text = f" {row['peak_mib']:,} MiB"
        if "peak_ratio" in row:
            text += f"  {100 * (row['peak_ratio'] - 1):+.0f} %,  {row['speed_ratio']:.2f}x tokens/s"
            axes.plot([rows[ROWS[name][1]]["peak_mib"]] * 2, [place - 0.45, place + 0.45], color=BASE_COLOUR, lw=1)
        axes.text(max(row["peak_mib"], rows.get(ROWS[name][1], row)["peak_mib"]), place, text, va="center", fontsize=8)
    axes.set_yticks(list(places.values()), list(places), fontsize=8)
    axes.set_xlim(0, 1.45 * max(row["peak_mib"] for row in rows.values()))
    axes.set_xlabel("highest memory of a training step, MiB; the line is the row that it is compared with", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    kinds = {"weights, gradients, optimizer": STATE_COLOUR, "activations, temporary tensors": ACTIVATION_COLOUR}
    bars = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in kinds.values()]
    axes.legend(bars, list(kinds), fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.1), ncols=2, frameon=False)
    figure.savefig(path, dpi=120, bbox_inches="tight", facecolor="white")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=2, help="sequences of a step, which is one micro-batch")
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
        found = train(args.directory, ROWS[args.row][0], args)
        print(json.dumps(found), file=standard_output)
        return
    from mindspeed_llm.checkpoint.toy import make_toy

    if args.quick:
        args.rounds, args.sequence, args.layers = 1, 256, 4
    sizes = (TINY if args.quick else WIDE) | {"num_hidden_layers": args.layers}
    sizes |= {"max_position_embeddings": args.sequence}
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in args.only}
    with tempfile.TemporaryDirectory() as scratch:
        dense = str(make_toy("llama", Path(scratch) / "llama", dtype="bfloat16", **sizes))
        # Fewer layers, each of which has eight MLPs.
        few = sizes | EXPERTS | {"num_hidden_layers": max(args.layers // 2, 2)}
        experts = str(make_toy("mixtral", Path(scratch) / "mixtral", dtype="bfloat16", **few))
        for number in range(args.rounds):
            for name in args.only[number % len(args.only) :] + args.only[: number % len(args.only)]:
                measured[name].append(run_row(name, experts if name.startswith(MOE) else dense, args))
    rows = summary(measured, args.batch * args.sequence)
    show(rows)
    if args.chart:
        chart(rows, args.chart)
    result = {"benchmark": "memory", "dtype": "bf16", "threads": args.threads, "rounds": args.rounds}
    result |= {"layers": args.layers, "sequence": args.sequence, "batch": args.batch, "rows": rows}
    print(json.dumps(result | {"load_average": round(os.getloadavg()[0], 2)}), file=standard_output)


if __name__ == "__main__":
    main()
