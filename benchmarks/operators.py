#!/usr/bin/env python3
"""Time of every implementation of the elementwise, norm, loss and optimizer operators beside its reference.

    python benchmarks/operators.py [--shapes llama3-8b qwen3-30b-a3b small] [--rounds 5] [--operators rms_norm ...]

Shapes are those of the named models for 8192 tokens; `small` is what a CPU does in seconds and the default there, and
fits into caches that the copy does not. Each row is forward and backward together. Bytes are what a perfect kernel
moves (docs/operators.md), `of copy` their rate over that of copying a large tensor here, measured first.
Implementations take turns; medians of the rounds. Prints one JSON line per row and then a table.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from measure import interleaved

from mindspeed_llm import accelerator
from mindspeed_llm.ops import registry
from mindspeed_llm.ops.activation import Gate
from mindspeed_llm.ops.adamw import Rates
from mindspeed_llm.ops.rotary import rotary_table


class Shapes(NamedTuple):
    """Sizes of one model: tokens, hidden, MLP (of one expert), query heads, groups, head, vocabulary."""

    tokens: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head: int
    vocabulary: int


SHAPES = {
    "llama3-8b": Shapes(8192, 4096, 14336, 32, 8, 128, 128256),
    "qwen3-30b-a3b": Shapes(8192, 2048, 768, 32, 4, 128, 151936),
    "small": Shapes(512, 256, 512, 4, 2, 64, 4000),
}
COPY_BYTES = {"cuda": 2**30, "npu": 2**30, "cpu": 2**27}


class Row(NamedTuple):
    """One operator at one shape: its inputs, and the bytes of a perfect forward and backward; None if compute-bound."""

    operator: str
    inputs: tuple[Any, ...]
    bytes: float | None


def rows(shapes: Shapes, device: torch.device) -> list[Row]:
    """Every operator on bf16 activations of these shapes."""

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=device, dtype=torch.bfloat16).requires_grad_()

    s, h, f, n, g, d, v = shapes
    table = rotary_table(torch.arange(s)[None], 1e4 ** (-torch.arange(d // 2) / (d // 2)), 1.0, torch.bfloat16)
    table = table.to(device)
    qkv = (n + 2 * g) * d
    labels = torch.randint(0, v, (s,), device=device)
    master = [torch.randn(h, f, device=device) for _ in range(4)]
    lists = [[t] for t in (*master[:2], master[2].zero_(), master[3].zero_())]
    steps = [torch.zeros((), device=device)]
    square = min(s, 2048)
    return [
        Row("rms_norm", (draw(s, 1, h), draw(h), 1e-5), 10.0 * s * h),
        Row("add_rms_norm", (draw(s, 1, h), draw(s, 1, h), draw(h), 1e-5), 16.0 * s * h),
        Row("layer_norm", (draw(s, 1, h), draw(h), draw(h), 1e-5), 10.0 * s * h),
        Row("swiglu", (draw(s, 1, 2 * f),), 16.0 * s * f),
        Row("gated_activation", (draw(s, 1, 2 * f), Gate("gelu_tanh")), 16.0 * s * f),
        Row("rotary", (draw(s, 1, n, d), table), 8.0 * s * n * d),
        Row("neighbour_rotary", (draw(s, 1, n, d), table), 8.0 * s * n * d),
        Row("split_qkv_rotary", (draw(s, 1, qkv), g, d, table), 8.0 * s * qkv),
        Row("scaled_masked_softmax", (draw(1, n, square, square), None, 0.1, True), 10.0 * n * square * square),
        Row("linear_cross_entropy_sum", (draw(s, h), draw(v, h), labels, v), None),
        Row("vocab_parallel_cross_entropy", (draw(s // 4, v), labels[: s // 4], None), 8.0 * (s // 4) * v),
        Row("adamw", (*lists, steps, Rates(1e-4, 0.9, 0.95, 1e-8, 0.1)), 28.0 * h * f),
        Row("quantize_nf4", (draw(h, f).detach(), 64), 2.5 * h * f),
    ]


def runner(function: Callable[..., Any], inputs: tuple[Any, ...], wait: Callable[[], Any]) -> Callable[[], None]:
    """One forward and backward pass, until the device is done."""
    leaves = [i for i in inputs if isinstance(i, torch.Tensor) and i.requires_grad]
    directions: list[torch.Tensor] = []

    def run() -> None:
        outputs = function(*inputs)
        if leaves:
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            if not directions:
                directions.extend(torch.randn_like(o) for o in outputs)
            torch.autograd.grad(outputs, leaves, directions)
        wait()

    return run


def copy_rate(device: torch.device, wait: Callable[[], Any]) -> float:
    """Bytes per second that a copy reads and writes."""
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = interleaved({"copy": lambda: (target.copy_(source), wait())}, 7)["copy"]
    return 2.0 * source.numel() / statistics.median(seconds)


def measure(name: str, row: Row, rounds: int, bandwidth: float) -> list[dict[str, Any]]:
    """One record for each implementation that runs here."""
    device = accelerator.current()
    usable = [e for e in registry.implementations(row.operator) if e.missing(device.device_type) is None]
    sides = {e.name: runner(e.function, row.inputs, device.synchronize) for e in usable}
    registry.reset()
    chosen = registry.chosen()[row.operator]
    records = []
    for side, seconds in interleaved(sides, rounds).items():
        middle = statistics.median(seconds)
        share = None if row.bytes is None else round(row.bytes / middle / bandwidth, 3)
        records.append(
            {
                "shapes": name,
                "operator": row.operator,
                "implementation": side,
                "chosen": side == chosen,
                "ms": round(1e3 * middle, 4),
                "of_copy": share,
            }
        )
    return records


def show(records: list[dict[str, Any]]) -> None:
    """The records as an aligned table, the chosen implementation marked."""
    header = ("shapes", "operator", "implementation", "ms", "of copy")
    lines = [header]
    for r in records:
        share = "-" if r["of_copy"] is None else f"{100 * r['of_copy']:.0f} %"
        name = r["implementation"] + (" *" if r["chosen"] else "")
        lines.append((r["shapes"], r["operator"], name, f"{r['ms']:.3f}", share))
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for line in lines:
        print("  ".join(cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES))
    parser.add_argument("--operators", nargs="+")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    device = accelerator.current()
    on_cpu = device.device_type == "cpu"
    bandwidth = copy_rate(torch.device(device.device_type), device.synchronize)
    machine = {"device": device.model(), "torch": torch.__version__, "python": platform.python_version()}
    print(json.dumps(machine | {"copy_GB_per_s": round(bandwidth / 1e9, 1)}))
    records = []
    for name in options.shapes or (["small"] if on_cpu else ["llama3-8b", "qwen3-30b-a3b"]):
        for row in rows(SHAPES[name], torch.device(device.device_type)):
            if not options.operators or row.operator in options.operators:
                found = measure(name, row, options.rounds, bandwidth)
                records += found
                for record in found:
                    print(json.dumps(record), flush=True)
    show(records)


if __name__ == "__main__":
    main()
