#!/usr/bin/env python3
"""Time of every implementation of every operator beside its reference, torch's own functions and the machine's limit.

    python benchmarks/operators.py [--shapes llama3-8b qwen3-30b-a3b] [--dtypes fp32 bf16] [--tokens N] [--ranks N]
                                   [--rounds N] [--only rms_norm ...] [--json FILE]
                                   [--clock cpu]

Every row is a layer of the named model for `--tokens` tokens (8192; 2048 on a CPU), its vocabulary and experts divided
among `--ranks` ranks (1; 8 on a CPU). The forward pass and forward and backward together are timed apart. All sides of
a row take turns, and one of them is the limit: a copy of as many bytes as a perfect kernel reads and writes, into
memory that is there already, or a matrix product whose rate bounds the row's own. Shares of the limit and ratios are
medians over the rounds, of figures of the same round. `--clock cpu` counts the processor's seconds of this process
instead of those that pass: for one thread on a machine that others use, too. Operators of several ranks are not
measured.

Prints a JSON line per row, then a table (`*` is what is chosen on this device), then what is slower than the reference
or torch although it is chosen. Implementations are those of the package, Liger-Kernel's and others' where installed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import interleaved, median_ratio
from operator_rows import SHAPES, Draws, Row

from mindspeed_llm import accelerator
from mindspeed_llm.ops import registry

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
LIMIT = "limit"
PRODUCT_SIZE = {"cpu": 768, "cuda": 8192, "npu": 8192}
# A chosen implementation that takes this many times as long as another is reported.
TOLERANCE = 1.05


def runner(function: Callable[..., Any], row: Row, backward: bool, wait: Callable[[], Any]) -> Callable[[], None]:
    """One pass, until the device is done."""
    leaves = [i for i in row.inputs if isinstance(i, torch.Tensor) and i.requires_grad] if backward else []
    directions: list[torch.Tensor] = []

    def run() -> None:
        outputs = function(*row.inputs)
        if leaves:
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            outputs = [o for o in outputs if o.requires_grad]
            if not directions:
                # What arrives at a loss is 1.
                directions.extend(torch.randn_like(o) if o.dim() else torch.ones_like(o) for o in outputs)
            torch.autograd.grad(outputs, leaves, directions)
        wait()

    return run


def limit(row: Row, part: int, dtype: torch.dtype, wait: Callable[[], Any]) -> tuple[Callable[[], None], float]:
    """What is run as the limit, and how many times as long the row takes at its best."""
    device = next(i for i in _tensors(row.inputs)).device
    if row.moved is not None:
        source = torch.ones(max(1, int(row.moved[part] / 2)), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return lambda: (target.copy_(source), wait()), 1.0
    size = PRODUCT_SIZE[device.type]
    a, b = torch.ones(size, size, dtype=dtype, device=device), torch.ones(size, size, dtype=dtype, device=device)
    out = torch.empty_like(a)
    return lambda: (torch.mm(a, b, out=out), wait()), row.flop[part] / (2.0 * size**3)


def _tensors(inputs: Any) -> list[torch.Tensor]:
    if isinstance(inputs, torch.Tensor):
        return [inputs]
    return [t for i in inputs for t in _tensors(i)] if isinstance(inputs, (tuple, list)) else []


def sides_of(row: Row, device_type: str) -> dict[str, Callable[..., Any]]:
    """Name -> function: the implementations that run here, then torch's."""
    usable = [e for e in registry.implementations(row.operator) if e.missing(device_type) is None]
    sides = {e.name: e.function for e in usable if row.reference or e.name != registry.REFERENCE}
    return sides | row.peers


def measure(row: Row, dtype: torch.dtype, rounds: int, clock: Callable[[], float]) -> list[dict[str, Any]]:
    """One record for each side: ms, share of the limit and times the chosen one's, forward and both."""
    device = accelerator.current()
    functions = sides_of(row, device.device_type)
    chosen = registry.chosen()[row.operator]
    records = [{"operator": row.operator, "side": name, "chosen": name == chosen} for name in functions]
    differentiated = any(t.requires_grad for t in _tensors(row.inputs))
    for part, key in enumerate(("forward", "both")[: 1 + differentiated]):
        at_best, times = limit(row, part, dtype, device.synchronize)
        runs = {name: runner(f, row, part == 1, device.synchronize) for name, f in functions.items()}
        seconds = interleaved({LIMIT: at_best} | runs, rounds, clock)
        amount, unit = (row.moved, "GB_per_s") if row.moved else (row.flop, "GFLOP_per_s")
        best = statistics.median(seconds[LIMIT]) * times
        for record in records:
            own = seconds[record["side"]]
            record[f"{key}_ms"] = round(1e3 * statistics.median(own), 4)
            record[f"{key}_of_limit"] = float(f"{times * median_ratio(seconds[LIMIT], own):.4g}")
            record[f"{key}_of_chosen"] = round(median_ratio(own, seconds[chosen]), 3)
            record[f"{key}_limit"] = {
                "of": "copy" if row.moved else "product",
                unit: round(amount[part] / best / 1e9, 2),
            }
    return records


def show(records: list[dict[str, Any]]) -> None:
    """The records as an aligned table."""
    header = (
        "shapes",
        "dtype",
        "operator",
        "side",
        "fwd ms",
        "of limit",
        "x chosen",
        "both ms",
        "of limit",
        "x chosen",
    )
    lines = [header]
    for r in records:
        figures: list[str] = []
        for key in ("forward", "both"):
            if f"{key}_ms" in r:
                figures += [
                    f"{r[f'{key}_ms']:.2f}",
                    f"{100 * r[f'{key}_of_limit']:.0f} %",
                    f"{r[f'{key}_of_chosen']:.2f}",
                ]
            else:
                figures += ["", "", ""]
        lines.append((r["shapes"], r["dtype"], r["operator"], r["side"] + " *" * r["chosen"], *figures))
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for line in lines:
        print("  ".join(c.ljust(w) if i < 4 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))).rstrip())


def behind(records: list[dict[str, Any]]) -> list[str]:
    """A line for each side that is faster than what is chosen."""
    return [
        f"{r['shapes']} {r['dtype']} {r['operator']} {key}: {r['side']} takes {r[f'{key}_of_chosen']} of its time"
        for r in records
        for key in ("forward", "both")
        if r.get(f"{key}_of_chosen", 1.0) * TOLERANCE < 1.0
    ]


def arguments() -> argparse.Namespace:
    """The command line."""
    on_cpu = accelerator.current().device_type == "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["llama3-8b", "qwen3-30b-a3b"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--tokens", type=int, default=2048 if on_cpu else 8192)
    parser.add_argument("--ranks", type=int, default=8 if on_cpu else 1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--only", nargs="+", metavar="OPERATOR")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine and records there, too")
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    options = arguments()
    device = accelerator.current()
    machine = {"device": device.model(), "torch": torch.__version__, "python": platform.python_version()}
    machine |= {"threads": torch.get_num_threads(), "load_average": os.getloadavg()[0]}
    machine |= {name: getattr(options, name) for name in ("tokens", "ranks", "rounds", "clock")}
    print(json.dumps(machine))
    records = []
    for name in options.shapes:
        for kind in options.dtypes:
            draws = Draws(SHAPES[name], options.tokens, options.ranks, DTYPES[kind], torch.device(device.device_type))
            for operator, make in draws.rows().items():
                if options.only and operator not in options.only:
                    continue
                for record in measure(make(), DTYPES[kind], options.rounds, CLOCKS[options.clock]):
                    records.append({"shapes": name, "dtype": kind} | record)
                    print(json.dumps(records[-1]), flush=True)
    show(records)
    print(*behind(records), sep="\n")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "records": records}, indent=1))


if __name__ == "__main__":
    main()
