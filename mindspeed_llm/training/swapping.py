"""Activation swap of a run, by its options."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mindspeed_llm.config.memory import MemoryConfig, swap_budget_bytes, swapped_modules
from mindspeed_llm.plan.plan import Plan

if TYPE_CHECKING:
    from mindspeed_llm.memory.swap import ActivationSwap


def swap_activations(plan: Plan, chunks: list[torch.nn.Module]) -> ActivationSwap | None:
    """Let built chunks swap as the options say; None where they do not ask for it."""
    options: MemoryConfig = plan.config.memory
    if not (options.swap_attention or options.swap_layer_input):
        return None
    import torch.distributed as dist

    from mindspeed_llm.memory.allowance import UpToHostBytes, WhatHides
    from mindspeed_llm.memory.regions import install
    from mindspeed_llm.memory.store import open_store
    from mindspeed_llm.memory.swap import ActivationSwap
    from mindspeed_llm.parallel.shards import gathered_parameters, local_values

    def say(line: str) -> None:
        if dist.get_rank() == 0:
            print(f" {line}", flush=True)

    gathered = [parameter for chunk in chunks for parameter in gathered_parameters(chunk)]

    def long_lived() -> Iterator[Tensor]:
        yield from gathered
        for chunk in chunks:
            yield from map(local_values, chunk.parameters())
            yield from chunk.buffers()

    store, limit = open_store(), swap_budget_bytes(options.swap_budget)
    allowance = WhatHides(store) if limit is None else UpToHostBytes(store, limit)
    swap = ActivationSwap(store, allowance, long_lived, say)
    modules = swapped_modules(options.swap_modules) if options.swap_attention else []
    install(swap, chunks, modules, options.swap_layer_input)
    return swap
