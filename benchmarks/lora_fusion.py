#!/usr/bin/env python3
"""Step time of adapted layers over two ranks: unfused, unfused with chunked overlap, fused, over a cable of given rate.

    python benchmarks/lora_fusion.py [--megabits 100 200 400 0] [--tokens 512] [--rounds 3] [--plot FILE] [--quick]

Two processes of one thread each, tensor and sequence parallel, in two network namespaces whose cable `tc` limits (0: no
limit; needs root). A step is forward and backward through two layers (attention and MLP, rank-16 adapters on all four
linears, frozen base, fp32). All sides run in one process and take turns; a time is the slower rank's, figures are
medians of the rounds. Prints one JSON line:

    unfused    base and adapter one after the other, each with its own collectives (`--no-lora-fusion`)
    coc        the same, the base's communication in 4 chunks beside its products (`--use-ascend-coc`)
    fused      one function, chunks chosen by rates measured over the same cable
    path       what lora/fusion/cost.py predicts for fused: computation as measured + what the graph leaves exposed
    bound      max(computation alone, communication alone), both measured

gloo's reduce-scatter sends as much as an all-reduce. So that the difference is not to fused's credit, all sides use one
that does not; --gloo-scatter leaves gloo's to the unfused sides. Their all-gathers are gloo's, fused exchanges messages
(lora/fusion/exchange.py): that part of the difference is to its credit.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from unittest import mock

import veth

RANKS, LAYERS, ADAPTER_RANK, COC_CHUNKS = 2, 2, 16, 4
# hidden size -> (feed-forward, heads, groups of heads)
SHAPES = {128: (352, 4, 2), 256: (704, 8, 4), 1024: (2816, 16, 8)}
PORT = 29517
AIM, AIM_OF_PATH = 1.4, 0.9


def exchange_scatter(out, given, op=None, group=None, async_op=False):
    """reduce-scatter of two ranks: each sends what the other needs."""
    import torch
    import torch.distributed as dist

    own, received = given.view(RANKS, -1)[dist.get_rank()], torch.empty_like(out).view(-1)
    other = given.view(RANKS, -1)[1 - dist.get_rank()].contiguous()
    sizes = [other.numel() * (rank != dist.get_rank()) for rank in range(RANKS)]
    work = dist.all_to_all_single(received, other, sizes, sizes, group=group, async_op=True)

    class Sum:
        def wait(self):
            work.wait()
            torch.add(own, received, out=out.view(-1))

    if async_op:
        return Sum()
    Sum().wait()


class Side:
    """One rank's layers, run in any of the ways."""

    def __init__(self, hidden: int) -> None:
        import torch

        from mindspeed_llm.lora.fusion.configure import adapted_linears
        from mindspeed_llm.lora.inject import inject_adapters
        from mindspeed_llm.models.build import BuildOptions, build_model
        from mindspeed_llm.models.shape import ModelShape
        from mindspeed_llm.parallel.setup import initialize_distributed
        from mindspeed_llm.plan.adapters import AdapterSettings

        initialize_distributed(tensor_parallel_size=RANKS)
        ffn, heads, groups = SHAPES[hidden]
        shape = ModelShape("llama", LAYERS, hidden, ffn, heads, groups, hidden // heads, 128, 4096)
        options = BuildOptions(tensor_parallel_size=RANKS, sequence_parallel=True)
        self.model, self.hidden = build_model(shape, options), hidden
        self.model.requires_grad_(False)
        targets = dict.fromkeys(("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"), ())
        inject_adapters(self.model, AdapterSettings(ADAPTER_RANK, 32.0, 0.0, targets))
        self.linears = [*adapted_linears(self.model)]
        for linear in self.linears:
            for factor in linear.lora_B.values():
                torch.nn.init.normal_(factor, std=0.02)

    def become(self, fused: bool, coc: int | None = None, chunks: int | None = None) -> None:
        """Run the linears that way from now on; fused without chunks measures the cable."""
        from mindspeed_llm.lora.fusion.configure import configure_fusion

        self.rates = configure_fusion([self.model], fused=fused, chunks=chunks)
        self.model.config.communication_chunks = coc

    def keep(self) -> Callable[[], None]:
        """A call that makes the linears as they are now."""
        kinds, coc = [linear.kind for linear in self.linears], self.model.config.communication_chunks

        def restore() -> None:
            self.model.config.communication_chunks = coc
            for linear, kind in zip(self.linears, kinds):
                linear.kind = kind

        return restore

    def step(self, tokens: int) -> None:
        """Forward and backward of `tokens` tokens, with a gradient for what comes in, as in the middle of a model."""
        import torch

        if tokens not in self.__dict__:
            positions = torch.arange(tokens)[None]
            x = torch.randn(tokens // RANKS, 1, self.hidden)
            self.__dict__[tokens] = (x, self.model._rotary_table(None, positions, None))
        x, table = self.__dict__[tokens]
        out = self.model.decoder(hidden_states=x.detach().requires_grad_(), attention_mask=None, rotary_pos_emb=table)
        out.backward(x)
        for linear in self.linears:
            for name, parameter in linear.named_parameters():
                if name.startswith("lora_"):
                    parameter.grad = None

    def predicted(self, computation: float, tokens: int) -> tuple[float, list[int]]:
        """Step time from the graph, and the chunks of each pass of a layer."""
        from mindspeed_llm.lora.fusion.configure import passes
        from mindspeed_llm.lora.fusion.cost import choose, exposed, fused_tasks

        total, chosen = computation, []
        for linear in self.linears:
            for size in passes(linear, tokens):
                schedule = choose(size, self.rates)
                total += exposed(fused_tasks(size, self.rates, schedule))
                chosen.append(schedule.chunks)
        return total, chosen[: len(chosen) // LAYERS]


def timed(run: Callable[[], None]) -> float:
    """Seconds, of the slower rank; both begin together."""
    import torch
    import torch.distributed as dist

    dist.barrier()
    begin = time.perf_counter()
    run()
    taken = torch.tensor(time.perf_counter() - begin)
    dist.all_reduce(taken, op=dist.ReduceOp.MAX)
    return float(taken)


def without_sending(run: Callable[[], None]) -> list[Callable[[], None]]:
    """Run with exchanges in which nothing is sent; returns calls that send what each would have sent."""
    from mindspeed_llm.lora.fusion.exchange import Exchange

    calls: list[Callable[[], None]] = []

    class Still(Exchange):
        def __init__(self, numbers, like, group):
            self.received = like.new_zeros(group.size() - 1, numbers)
            self.call = (numbers, like, group)

        def start(self, sent):
            calls.append(functools.partial(_send, self.call, sent))

        def wait(self):
            pass

    with mock.patch("mindspeed_llm.lora.fusion.products.Exchange", Still):
        run()
    return calls


def _send(call, sent):
    from mindspeed_llm.lora.fusion.exchange import Exchange

    exchange = Exchange(*call)
    exchange.start(sent)
    exchange.wait()


def measure(side: Side, tokens: int, rounds: int) -> dict:
    """All sides over the cable as it is now."""
    side.become(True, chunks=1)
    plain = side.keep()
    side.become(False)
    ways = {"unfused": side.keep()}
    side.become(False, coc=COC_CHUNKS)
    ways["coc"] = side.keep()
    side.become(True)
    ways["fused"] = side.keep()
    rates = side.rates
    seconds: dict[str, list[float]] = {name: [] for name in (*ways, "computation", "communication")}
    calls: list[Callable[[], None]] = []
    for number in range(rounds + 1):
        for name, way in ways.items():
            way()
            seconds[name].append(timed(lambda: side.step(tokens)))
        plain()
        calls.clear()
        seconds["computation"].append(timed(lambda: calls.extend(without_sending(lambda: side.step(tokens)))))
        seconds["communication"].append(timed(lambda: [send() for send in calls]))
        if number == 0:
            seconds = {name: [] for name in seconds}
    ways["fused"]()
    side.rates = rates
    found = {name: statistics.median(times) for name, times in seconds.items()}
    found["path"], found["chunks"] = side.predicted(found["computation"], tokens)
    found["bound"] = max(found["computation"], found["communication"])
    found["fused_over_unfused"] = statistics.median(a / b for a, b in zip(seconds["unfused"], seconds["fused"]))
    found["of_path"] = found["path"] / found["fused"]
    found["rates"] = {"gflops": rates.flops / 1e9, "gather_us": rates.gather.latency * 1e6}
    found["rates"]["gather_handling_us"] = rates.gather.handling * 1e6
    found["rates"]["gather_megabits"] = rates.gather.bandwidth * 8e-6 / RANKS
    return found


def worker(arguments: argparse.Namespace) -> None:
    """One rank: joins over the cable, measures every case, and rank 0 prints them."""
    os.environ.update(GLOO_SOCKET_IFNAME=veth.Cable.device, MINDSPEED_LLM_DEVICE="cpu", RANK=str(arguments.worker))
    os.environ.update(WORLD_SIZE=str(RANKS), MASTER_ADDR=veth.ADDRESSES[0], MASTER_PORT=str(PORT))
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if not arguments.gloo_scatter:
        dist.reduce_scatter_tensor = exchange_scatter  # before megatron-core takes its own name for it
    from mindspeed_llm.parallel.setup import initialize_process_group

    initialize_process_group()
    side, results = Side(arguments.hidden), []
    gc.disable()
    for megabits in arguments.megabits:
        veth.limit_rate(megabits or None)
        for tokens in arguments.tokens:
            results.append({"megabits": megabits, "tokens": tokens, **measure(side, tokens, arguments.rounds)})
            gc.collect()
            if arguments.worker == 0:
                print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    if arguments.worker == 0:
        print(json.dumps(results), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def plot(results: list[dict], file: str) -> None:
    """Step time over the cable's rate, or over the tokens where there is one rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    by_rate = len({r["megabits"] for r in results}) > 1
    key, label = ("megabits", "rate of the cable [Mbit/s]") if by_rate else ("tokens", "tokens")
    rows = sorted((r for r in results if r[key]), key=lambda r: r[key])
    figure, axes = pyplot.subplots(figsize=(6, 4))
    looks = {"unfused": "o-", "coc": "s-", "fused": "D-", "path": "k--", "bound": "k:"}
    for name, look in looks.items():
        axes.loglog([r[key] for r in rows], [1000 * r[name] for r in rows], look, label=name)
    axes.set(xlabel=label, ylabel="step [ms]")
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=90)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabits", type=float, nargs="+", default=[100, 200, 400, 800, 1600, 0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512])
    parser.add_argument("--hidden", type=int, choices=sorted(SHAPES), default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gloo-scatter", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a toy, to see that it runs")
    parser.add_argument("--plot", help="PNG file")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.megabits, arguments.tokens, arguments.hidden, arguments.rounds = [100, 0], [32], 128, 1
    if arguments.worker is not None:
        return worker(arguments)
    output = veth.output_of_first("lora_fusion")
    results = json.loads(output.splitlines()[-1])
    if arguments.plot:
        plot(results, arguments.plot)
    best = max(r["fused_over_unfused"] for r in results)
    summary = {"hidden": arguments.hidden, "results": results, "best_ratio": best, "aim": AIM}
    summary |= {"least_of_path": min(r["of_path"] for r in results), "aim_of_path": AIM_OF_PATH}
    print(json.dumps(summary | {"load_average": os.getloadavg()}))


if __name__ == "__main__":
    main()
