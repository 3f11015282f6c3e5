#!/usr/bin/env python3
"""Pre-training and fine-tuning of a ~110M Llama in bf16: real (unpadded) tokens/s here and in transformers with peft.

    python benchmarks/train.py [--mode pretrain full lora start] [--rounds 5] [--samples 64] [--sides ...] [--quick]

All sides train the same samples (lengths drawn from lengths.csv) with the same batch sizes, threads and optimizer, and
take turns; medians of the rounds. A round is all samples in optimizer steps of GLOBAL_BATCH. Padded sides and ours
joined use micro-batches of MICRO_BATCH samples, packed sides rows of PACKED_ROW tokens. Each program with its
allocator is a process of its own, which waits while another one's side runs. Pre-training has ROWS full rows a step.
`start` is the time from a launch to the first iteration of a tiny model, without and with the data in the cache. Prints
one JSON line.

    ours_joined                 micro-batches joined in one row without padding
    ours_packed                 packed rows
    peer_padded, peer_grouped   dynamic padding, in the order of the data or grouped by length
    peer_packed_mask            packed rows, SDPA with the mask transformers makes from positions
    peer_packed_documents       packed rows, SDPA document by document
    ..._keep                    the same with freed memory kept, as --cpu-allocator keep does
    ours_packed_compiled        the same with --compile-operators
    ours_packed_prepacked       the same with --compile-operators and --lora-prepack (LoRA only)
    peer_packed_documents_compiled  the same with torch.compile, for rows of any length, of all but attention

Compiling happens in the round before the first, which no figure but seconds_before_measuring counts.
On a machine that others use, too, `tokens_per_cpu_second` with `--threads 1` tells more than what passes on the clock.
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
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from lengths import draw_samples
from measure import interleaved, matmul_flops_per_second, median_ratio

LLAMA_110M = {
    "num_hidden_layers": 12,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
}
TINY = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "vocab_size": 1000}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
GLOBAL_BATCH, MICRO_BATCH, PACKED_ROW = 32, 8, 2048
# Rows of PACKED_ROW tokens in a step of pre-training, one in each micro-batch.
ROWS = 2
LORA_RANK, LEARNING_RATE = 16, 1e-4
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MODES = ("pretrain", "full", "lora", "start")
AIMS = {"packed": 1.5, "padded": 2.5, "pretrain_share_of_matmul_rate": 0.6, "seconds_to_first_iteration": 15}
# What is set for a process -> our flags for it; the peer knows "keep" and "compiled", too.
SETTINGS = {
    "system": "--cpu-allocator system",
    "keep": "--cpu-allocator keep",
    "compiled": "--compile-operators",
    "prepacked": "--compile-operators --lora-prepack",
}
# Side -> (program, setting of its process).
SIDES = {
    "ours_joined": ("ours", "system"),
    "ours_packed": ("ours", "system"),
    "ours_packed_keep": ("ours", "keep"),
    "ours_packed_compiled": ("ours", "compiled"),
    "ours_packed_prepacked": ("ours", "prepacked"),
    "peer_padded": ("peer", "system"),
    "peer_grouped": ("peer", "system"),
    "peer_packed_mask": ("peer", "system"),
    "peer_packed_documents": ("peer", "system"),
    "peer_packed_mask_keep": ("peer", "keep"),
    "peer_packed_documents_keep": ("peer", "keep"),
    "peer_packed_documents_compiled": ("peer", "compiled"),
}
# What pre-training has of them: its rows are full.
FULL_ROWS = (
    "ours_packed",
    "ours_packed_compiled",
    "peer_packed_mask",
    "peer_packed_documents",
    "peer_packed_documents_compiled",
)


def full_rows(vocab_size: int, seed: int) -> list[dict[str, np.ndarray]]:
    """ROWS samples of PACKED_ROW random tokens, all of them labelled."""
    numbers = np.random.default_rng(seed).integers(0, vocab_size, (ROWS, PACKED_ROW + 1))
    return [{"input_ids": row[:-1], "labels": row[1:]} for row in numbers]


def groups(samples: list, size: int) -> list[list]:
    """Consecutive groups of `size`."""
    return [samples[start : start + size] for start in range(0, len(samples), size)]


def packed_rows(samples: list) -> list[list]:
    """Samples of each row of PACKED_ROW tokens."""
    from mindspeed_llm.data.packing import pack

    return [[samples[i] for i in row] for row in pack([len(s["input_ids"]) for s in samples], PACKED_ROW)]


def grouped_by_length(samples: list) -> list[list[list]]:
    """Steps of micro-batches of about equally long samples, grouped over all samples as `group_by_length` does."""
    ordered = sorted(samples, key=lambda sample: -len(sample["input_ids"]))
    micro = groups(ordered, MICRO_BATCH)
    steps = -(-len(samples) // GLOBAL_BATCH)
    return [micro[first::steps] for first in range(steps)]


class Ours:
    """Our training path: plan, model, optimizer and the loop's own step.

    Args:
        mode: "lora", "full" or "pretrain".
        setting: one of `SETTINGS`.
    """

    def __init__(self, directory: str, mode: str, threads: int, setting: str = "system") -> None:
        from mindspeed_llm.config.parser import parse
        from mindspeed_llm.plan.plan import resolve
        from mindspeed_llm.training.run import make_optimizer
        from mindspeed_llm.training.setup import build, start_processes

        self.batch, micro_batch = (ROWS, 1) if mode == "pretrain" else (GLOBAL_BATCH, MICRO_BATCH)
        words = f"--load {directory} --data-path none --bf16 --lr {LEARNING_RATE} --lr-decay-style constant "
        words += f"--weight-decay 0.01 --seq-length {PACKED_ROW} --global-batch-size {self.batch} --eval-iters 0 "
        words += f"--micro-batch-size {micro_batch} --num-threads {threads} --train-iters 1000000 "
        words += SETTINGS[setting]
        if mode == "lora":
            words += (
                f" --lora-r {LORA_RANK} --lora-alpha {2 * LORA_RANK} --lora-target-modules {' '.join(LORA_TARGETS)}"
            )
        self.plan = resolve(parse("posttrain", words.split()).config, [])
        start_processes(self.plan)
        self.model = build(self.plan)
        self.optimizer, self.scheduler = make_optimizer(self.plan, self.model, 1_000_000)

    def loop(self, steps: list[list[list]]) -> Any:
        """A training loop whose iterations are `steps` (micro-batches of samples), over and over."""
        from mindspeed_llm.training.loop import Progress, TrainingLoop

        data = Steps(steps, self.batch)
        args = (self.plan, self.model, self.optimizer, self.scheduler, data, None, Progress(), 1_000_000, None)
        return TrainingLoop(*args)


class Steps:
    """What a TrainingLoop asks of its data, from samples in memory."""

    valid, prefix = None, "samples in memory"

    def __init__(self, steps: list[list[list]], batch: int = GLOBAL_BATCH) -> None:
        self.steps, self.batch = steps, batch

    def sample_indices(self, consumed_samples: int) -> list[int]:
        """Numbers for messages."""
        return [consumed_samples]

    def micro_batches(self, consumed_samples: int, data_parallel_rank: int) -> list:
        """Joined micro-batches of the next step."""
        from mindspeed_llm.data.collate import collate_concatenated

        joined = []
        for samples in self.steps[consumed_samples // self.batch % len(self.steps)]:
            ids, labels = ([sample[name] for sample in samples] for name in ("input_ids", "labels"))
            joined.append(collate_concatenated([{"input_ids": i, "labels": n} for i, n in zip(ids, labels)], 0))
        return joined


def linear_shapes(shape: Any) -> dict[tuple[int, int], int]:
    """(in, out) of the products of one forward pass -> how often."""
    h, d, layers = shape.hidden_size, shape.kv_channels, shape.num_layers
    qkv = (shape.num_attention_heads + 2 * shape.num_query_groups) * d
    sizes = {(h, qkv): layers, (shape.num_attention_heads * d, h): layers}
    return {**sizes, (h, 2 * shape.ffn_hidden_size): layers, (shape.ffn_hidden_size, h): layers}


def model_flops(shape: Any, samples: list, mode: str) -> float:
    """Operations that training on `samples` takes, without padding."""
    from mindspeed_llm.training.flops import training_flops

    sizes = [len(sample["input_ids"]) for sample in samples]
    return training_flops(
        shape,
        tokens=sum(sizes),
        attention_pairs=sum(n * (n + 1) // 2 for n in sizes),
        output_tokens=sum(int((sample["labels"] != -100).sum()) for sample in samples),
        frozen_base=mode == "lora",
    )


def runs_of(program: str, setting: str, directory: str, mode: str, samples: list, threads: int) -> dict[str, Any]:
    """Side -> what runs its round and returns the first step's loss, for the sides of one process."""
    steps = groups(samples, GLOBAL_BATCH)
    micro, rows = [groups(s, MICRO_BATCH) for s in steps], [packed_rows(s) for s in steps]
    if program == "ours":
        ours = Ours(directory, mode, threads, setting)
        names = [name for name in SIDES if name.startswith("ours_packed")]
        loops = {"ours_joined": ours.loop(micro), **{name: ours.loop(rows) for name in names}}
        return {name: lambda loop=loop: [loop.step()[0].loss for _ in steps][0] for name, loop in loops.items()}
    from peer import MASKED, PER_DOCUMENT, Peer, document_batch, packed_batch, padded_batch

    from mindspeed_llm.accelerator import host_allocator

    if setting == "keep":
        host_allocator.keep_freed_memory()
    targets = LORA_TARGETS if mode == "lora" else ()
    peer = Peer(directory, targets, LORA_RANK, LEARNING_RATE, compiled=setting == "compiled")
    kinds = {
        "peer_padded": (micro, padded_batch, MASKED),
        "peer_grouped": (grouped_by_length(samples), padded_batch, MASKED),
        "peer_packed_mask": (rows, packed_batch, MASKED),
        "peer_packed_documents": (rows, document_batch, PER_DOCUMENT),
    }
    kinds |= {f"{name}_{setting}": kind for name, kind in kinds.items()}
    batches = {name: [[collate(m) for m in step] for step in steps] for name, (steps, collate, _) in kinds.items()}
    return {name: lambda name=name: [peer.step(step, kinds[name][2]) for step in batches[name]][0] for name in batches}


def serve(args: argparse.Namespace, samples: list, answers: Any) -> None:
    """Run the sides whose names arrive, a line each, and answer with loss and peak memory of each."""
    program, setting = args.serve
    runs = runs_of(program, setting, args.directory, args.mode[0], samples, args.threads)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        Path("/proc/self/clear_refs").write_text("5")  # the highest memory is counted from here
        begin, began = time.process_time(), time.perf_counter()
        loss = runs[line.strip()]()
        spent, passed = time.process_time() - begin, time.perf_counter() - began
        [peak] = [w.split()[1] for w in Path("/proc/self/status").read_text().splitlines() if w.startswith("VmHWM")]
        answer = {"loss": loss, "seconds": passed, "cpu_seconds": spent, "peak_mib": int(peak) / 1024}
        print(json.dumps(answer), file=answers, flush=True)


class Process:
    """A process that serves sides."""

    def __init__(self, program: str, setting: str, directory: str, mode: str, args: argparse.Namespace) -> None:
        words = [sys.executable, __file__, "--serve", program, setting, "--directory", directory, "--mode", mode]
        words += ["--threads", str(args.threads), "--samples", str(args.samples), "--seed", str(args.seed)]
        words += ["--quick"] * args.quick
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.answers: dict[str, list[dict[str, float]]] = {}

    def wait(self) -> str:
        """The next line."""
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a side ended with status {self.process.wait()}")
        return line

    def run(self, side: str) -> None:
        """One round of a side."""
        print(side, file=self.process.stdin, flush=True)
        self.answers.setdefault(side, []).append(json.loads(self.wait()))

    def close(self) -> None:
        """Let it end."""
        self.process.stdin.close()
        self.process.wait()


def measure(directory: str, mode: str, samples: list, args: argparse.Namespace) -> dict[str, Any]:
    """All sides of one mode."""
    from mindspeed_llm.accelerator import host_compiler
    from mindspeed_llm.models.hf_config import read_hf_config, shape_from_hf

    shape, rates = shape_from_hf(read_hf_config(directory)), []
    there = FULL_ROWS if mode == "pretrain" else [n for n in SIDES if mode == "lora" or SIDES[n][1] != "prepacked"]
    reason = host_compiler.why_not()
    if reason and not args.sides:
        print(f"{mode}: no side with compiled operators, because {reason}", file=sys.stderr)
        there = [name for name in there if SIDES[name][1] not in ("compiled", "prepacked")]
    chosen = {name: SIDES[name] for name in there if not args.sides or name in args.sides}
    processes = {kind: Process(*kind, directory, mode, args) for kind in dict.fromkeys(chosen.values())}
    for process in processes.values():
        process.wait()
    sides: dict[str, Any] = {name: lambda n=name, p=processes[kind]: p.run(n) for name, kind in chosen.items()}
    sides["matmul"] = lambda: rates.append(matmul_flops_per_second(PACKED_ROW, linear_shapes(shape)))
    seconds = interleaved(sides, args.rounds)
    del seconds["matmul"]
    for process in processes.values():
        process.close()
    answers = {name: processes[kind].answers[name] for name, kind in chosen.items()}
    return summary(seconds, rates[1:], answers, samples, model_flops(shape, samples, mode))


def summary(
    seconds: dict[str, list[float]], rates: list[float], answers: dict[str, list], samples: list, flops: float
) -> dict:
    """Medians, ratios and shares."""
    tokens = sum(len(sample["input_ids"]) for sample in samples)

    def fastest(names: tuple[str, ...]) -> str | None:
        measured = [name for name in names if name in seconds]
        return min(measured, key=lambda name: statistics.median(seconds[name])) if measured else None

    packed = fastest(("peer_packed_mask", "peer_packed_documents"))
    kept = fastest(("peer_packed_mask_keep", "peer_packed_documents_keep"))
    compiled = fastest(tuple(name for name in SIDES if name.startswith("peer_packed") and not name.endswith("keep")))
    pairs = {
        "packed_over_fastest_packed_peer": (packed, "ours_packed"),
        "packed_over_fastest_packed_peer_both_keep": (kept, "ours_packed_keep"),
        "packed_compiled_over_fastest_packed_peer": (compiled, "ours_packed_compiled"),
        "packed_prepacked_over_fastest_packed_peer": (compiled, "ours_packed_prepacked"),
        "packed_compiled_over_packed": ("ours_packed", "ours_packed_compiled"),
        "joined_over_padded_peer": ("peer_padded", "ours_joined"),
        "joined_over_grouped_peer": ("peer_grouped", "ours_joined"),
        "packed_over_padded_peer": ("peer_padded", "ours_packed"),
    }
    return {
        "tokens_per_second": {n: round(tokens / statistics.median(s), 1) for n, s in seconds.items()},
        "tokens_per_cpu_second": {
            name: round(tokens / statistics.median(a["cpu_seconds"] for a in given[1:]), 1)
            for name, given in answers.items()
        },
        **{k: round(median_ratio(seconds[a], seconds[b]), 2) for k, (a, b) in pairs.items() if {a, b} <= set(seconds)},
        "share_of_matmul_rate": {
            n: round(statistics.median(flops / t / r for t, r in zip(s, rates)), 3) for n, s in seconds.items()
        },
        "matmul_gigaflops_per_second": round(statistics.median(rates) / 1e9, 1),
        "fastest_packed_peer": packed,
        "fastest_packed_peer_compiled_or_not": compiled,
        "seconds_before_measuring": {name: round(given[0]["seconds"], 1) for name, given in answers.items()},
        "peak_mib": {name: round(max(a["peak_mib"] for a in given)) for name, given in answers.items()},
        "first_loss": {name: round(given[0]["loss"], 3) for name, given in answers.items()},
    }


def seconds_to_first_iteration(scratch: str) -> float:
    """Wall time from the launch of a tiny pre-training on raw text to its first log line; the second finds the data."""
    from mindspeed_llm.checkpoint.toy import make_toy

    model, text, cache = (Path(scratch) / name for name in ("tiny", "text.jsonl", "cache"))
    if not model.is_dir():
        make_toy("llama", model)
        text.write_text("".join(json.dumps({"text": f"{n} is a number. " * 20}) + "\n" for n in range(200)))
    words = (
        f"--load {model} --data-path {text} --cache-dir {cache} --seq-length 64 --global-batch-size 2 --train-iters 1 "
    )
    words += "--lr 1e-3 --progress lines --split 1"
    door = Path(__file__).parent.parent / "pretrain_gpt.py"
    begin = time.perf_counter()
    job = subprocess.Popen([sys.executable, str(door), *words.split()], stdout=subprocess.PIPE, text=True)
    seconds = next((time.perf_counter() - begin for line in job.stdout if "lm loss" in line), None)
    job.stdout.read()
    if job.wait() or seconds is None:
        raise SystemExit(f"a tiny pre-training ended with status {job.returncode}")
    return seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--sides", nargs="+", choices=SIDES, help="only these")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=64, help=f"a multiple of {GLOBAL_BATCH}")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one round of one optimizer step of a tiny model")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.samples % GLOBAL_BATCH:
        parser.error(f"--samples: {args.samples} is no multiple of {GLOBAL_BATCH}")
    if args.quick:
        args.rounds, args.samples = 1, GLOBAL_BATCH
    warnings.filterwarnings("ignore")
    import torch

    torch.set_num_threads(args.threads)
    from mindspeed_llm.checkpoint.toy import make_toy

    standard_output, sys.stdout = sys.stdout, sys.stderr
    model = TINY if args.quick else LLAMA_110M
    samples = draw_samples(args.samples, model["vocab_size"], args.seed)
    rows = full_rows(model["vocab_size"], args.seed)
    if args.serve:
        serve(args, rows if args.mode == ["pretrain"] else samples, standard_output)
        return
    result: dict[str, Any] = {"benchmark": "train", "dtype": "bf16", "threads": args.threads, "rounds": args.rounds}
    result |= {"samples": len(samples), "tokens": sum(len(s["input_ids"]) for s in samples), "aims": AIMS}
    with tempfile.TemporaryDirectory() as scratch:
        directory = str(make_toy("llama", scratch, dtype="bfloat16", **model))
        for mode in args.mode:
            if mode == "start":
                result["seconds_to_first_iteration"] = [round(seconds_to_first_iteration(scratch), 1) for _ in range(2)]
            else:
                result[mode] = measure(directory, mode, rows if mode == "pretrain" else samples, args)
    result["load_average"] = round(os.getloadavg()[0], 2)
    print(json.dumps(result), file=standard_output)


if __name__ == "__main__":
    main()
