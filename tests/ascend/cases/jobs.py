"""What the tests run on the CPU and on the simulated device, in processes of pools."""

from __future__ import annotations

import os
from typing import Any


def join_on_npu(rank: int, world_size: int, store: str) -> None:
    """Join an hccl group with the simulated device of this rank."""
    import simulator

    simulator.start()
    import torch
    import torch.distributed as dist

    os.environ["MINDSPEED_LLM_DEVICE"] = "npu"
    from mindspeed_llm import patches
    from mindspeed_llm.accelerator import show_to_megatron

    show_to_megatron("npu")
    patches.apply()
    # Otherwise every rank of a host would hold memory on the first device.
    assert not torch.npu.is_initialized(), "loading megatron opened a device before this rank chose its own"
    torch.npu.set_device(rank)
    dist.init_process_group("hccl", init_method=f"file://{store}", rank=rank, world_size=world_size)


def run(door: str, words: str, cache: str) -> dict[str, Any]:
    """Run one training door on this rank.

    Returns:
        Training and validation losses (known on the last rank), the device, and torch_npu's kernels that ran.
    """
    import torch.distributed as dist

    from mindspeed_llm import accelerator
    from mindspeed_llm.cli.training import run_door
    from mindspeed_llm.config.parser import parse

    if dist.is_initialized():
        world = str(dist.get_world_size())
        os.environ.update(WORLD_SIZE=world, LOCAL_WORLD_SIZE=world, RANK=str(dist.get_rank()))
        os.environ["LOCAL_RANK"] = str(dist.get_rank())
    os.environ["MINDSPEED_LLM_CACHE"] = cache
    kernels = calls()
    kernels.clear()
    result = run_door(parse(door, [*words.split(), "--progress", "lines", "--num-threads", "1"]))
    return {
        "train": [loss for _, loss in result.history.train],
        "valid": [loss for _, loss in result.history.valid],
        "device": accelerator.current().name,
        "kernels": set(kernels),
    }


def peak_of_building(words: str, cut: bool) -> tuple[int, int]:
    """(peak bytes on the device while a model is built and wrapped, bytes of its parameters)."""
    import torch
    import torch.distributed as dist

    from mindspeed_llm.config.parser import parse
    from mindspeed_llm.plan.plan import resolve
    from mindspeed_llm.training.setup import build, start_processes

    world = str(dist.get_world_size())
    os.environ.update(WORLD_SIZE=world, LOCAL_WORLD_SIZE=world, RANK=str(dist.get_rank()))
    parsed = parse("pretrain", [*words.split(), *(["--use-torch-fsdp2"] if cut else [])])
    plan = resolve(parsed.config, parsed.problems)
    start_processes(plan)
    torch.npu.empty_cache()
    torch.npu.reset_peak_memory_stats()
    before = torch.npu.memory_allocated()
    model = build(plan)
    whole = sum(parameter.numel() for parameter in model.chunks[0].parameters()) * 4
    return torch.npu.max_memory_allocated() - before, whole


def calls() -> Any:
    """Counter of torch_npu's kernels; an empty one on the CPU."""
    import collections
    import sys

    registry = sys.modules.get("simulator.kernels.registry")
    return registry.CALLS if registry else collections.Counter()


def answer(model: str, prompts: list[str]) -> list[str]:
    """Greedy answers of a model in this process."""
    import mindspeed_llm

    return mindspeed_llm.generate(mindspeed_llm.load_model(model), prompts, max_new_tokens=12)
