#!/usr/bin/env python3
"""Time of a layer with experts over two expert-parallel ranks, tokens travelling by themselves or while it computes.

    python benchmarks/moe_overlap.py [--megabits 100 200 400 0] [--tokens 512] [--rounds 3] [--quick]

Two processes of one thread each in two network namespaces whose cable `tc` limits (0: no limit; needs root). A step is
forward and backward of one layer: 8 experts, 2 for each token, fp32; once with shared experts of twice an expert's
width, once without. All sides run in one process and take turns; a time is the slower rank's, figures are medians of
the rounds. Prints one JSON line:

    off       exchange, experts, exchange, and shared experts before
    shared    shared experts while tokens travel (`--moe-shared-expert-overlap`)
    parts     and the experts of a rank in parts (`--moe-alltoall-overlap-comm`)
    bound     max(computation alone, communication alone), both measured on `off`, whose exchanges come one after the
              other; parts send both ways at once, so that unequal loads of the ranks can take them below it
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
from collections.abc import Callable
from functools import partial
from unittest import mock

import veth
from lora_fusion import timed

RANKS, EXPERTS, TOPK = 2, 8, 2
PORT = 29518
# hidden size -> width of an expert
SHAPES = {64: 128, 512: 1024}


class Done:
    """A collective that has happened."""

    def wait(self) -> None:
        """At once."""


class Side:
    """One rank's layers: the same weights, once for each way of computing them."""

    def __init__(self, hidden: int, shared: bool) -> None:
        from mindspeed_llm.models.build import BuildOptions, build_model
        from mindspeed_llm.models.moe.options import ExpertOptions
        from mindspeed_llm.models.shape import ModelShape

        width = SHAPES[hidden]
        shape = ModelShape(
            "qwen_moe", 1, hidden, width, 8, 8, hidden // 8, 128, 4096,
            num_moe_experts=EXPERTS, moe_ffn_hidden_size=width, moe_router_topk=TOPK,
            moe_shared_expert_intermediate_size=2 * width if shared else None,
        )  # fmt: skip
        self.hidden, self.layers = hidden, {}
        for name, overlap in {"off": "", "shared": "shared", "parts": "parts"}.items():
            if name == "shared" and not shared:
                continue
            experts = ExpertOptions(grouped_gemm=True, permute_fusion=True, overlap=overlap)
            model = build_model(shape, BuildOptions(expert_parallel_size=RANKS, experts=experts))
            self.layers[name] = model.decoder.layers[0].mlp.train()

    def step(self, name: str, x) -> None:
        """Forward and backward of tokens x [s, 1, h], with a gradient for what comes in."""
        layer = self.layers[name]
        layer(x.detach().requires_grad_())[0].backward(x)
        layer.zero_grad()


def without_sending(run: Callable[[], None]) -> list[Callable[[], None]]:
    """Run with exchanges that bring zeros at once; returns calls that send what each would have sent."""
    import torch.distributed as dist

    calls: list[Callable[[], None]] = []
    original = dist.all_to_all_single

    def call(out, *arguments, async_op=False, **keywords):
        calls.append(lambda: original(out, *arguments, **keywords))
        out.zero_()
        return Done()

    with mock.patch.object(dist, "all_to_all_single", call):
        run()
    return calls


def measure(side: Side, tokens: int, rounds: int) -> dict:
    """All sides over the cable as it is now."""
    import torch

    x = torch.randn(tokens, 1, side.hidden)
    seconds: dict[str, list[float]] = {name: [] for name in (*side.layers, "computation", "communication")}
    calls: list[Callable[[], None]] = []
    for number in range(rounds + 1):
        for name in side.layers:
            seconds[name].append(timed(partial(side.step, name, x)))
        calls.clear()
        seconds["computation"].append(timed(lambda: calls.extend(without_sending(lambda: side.step("off", x)))))
        seconds["communication"].append(timed(lambda: [send() for send in calls]))
        if number == 0:
            seconds = {name: [] for name in seconds}
    found = {name: statistics.median(times) for name, times in seconds.items()}
    found["bound"] = max(found["computation"], found["communication"])
    found["off_over_parts"] = statistics.median(a / b for a, b in zip(seconds["off"], seconds["parts"]))
    return found


def worker(arguments: argparse.Namespace) -> None:
    """One rank: joins over the cable, measures every case, and rank 0 prints them."""
    os.environ.update(GLOO_SOCKET_IFNAME=veth.Cable.device, MINDSPEED_LLM_DEVICE="cpu", RANK=str(arguments.worker))
    os.environ.update(WORLD_SIZE=str(RANKS), MASTER_ADDR=veth.ADDRESSES[0], MASTER_PORT=str(PORT))
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    from mindspeed_llm import patches
    from mindspeed_llm.parallel.setup import initialize_distributed

    patches.apply()
    initialize_distributed(expert_parallel_size=RANKS)
    sides, results = {shared: Side(arguments.hidden, shared) for shared in (True, False)}, []
    gc.disable()
    for megabits in arguments.megabits:
        veth.limit_rate(megabits or None)
        for shared, side in sides.items():
            found = measure(side, arguments.tokens, arguments.rounds)
            results.append({"megabits": megabits, "shared_experts": shared, "tokens": arguments.tokens, **found})
            gc.collect()
            if arguments.worker == 0:
                print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    if arguments.worker == 0:
        print(json.dumps({"rows": results}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabits", type=float, nargs="+", default=[100, 200, 400, 0])
    parser.add_argument("--tokens", type=int, default=512, help="of each rank")
    parser.add_argument("--hidden", type=int, choices=sorted(SHAPES), default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a toy, to see that it runs")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.megabits, arguments.tokens, arguments.hidden, arguments.rounds = [0], 32, 64, 1
    if arguments.worker is not None:
        return worker(arguments)
    output = veth.output_of_first("moe_overlap")
    print(output.splitlines()[-1])


if __name__ == "__main__":
    main()
