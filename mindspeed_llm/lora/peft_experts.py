"""Adapters of experts as PEFT keeps them for transformers 5, where a parameter stacks the linears of all experts.

PEFT wraps the module of the experts once for each adapted parameter, gate_up_proj first: its factors are those of the
inner wrapper (`experts.base_layer.lora_A`) where down_proj is adapted too. A is [experts * R, in], experts varying
slowest; B is [out, R * experts], experts varying fastest. Gate and up are one matrix: with an A of their own each, R is
the sum of their ranks and B has blocks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mindspeed_llm.errors import UserError
from mindspeed_llm.lora.tensors import AdapterTensors, PartAdapter
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.plan.adaptable import Adaptable, adaptable_modules
from mindspeed_llm.plan.adapters import AdapterSettings
from mindspeed_llm.plan.peft_settings import stacked_rank

FIRST, SECOND = "experts.linear_fc1", "experts.linear_fc2"


def _stacks(settings: AdapterSettings, shape: ModelShape) -> dict[str, tuple[Adaptable, int]]:
    """Path of PEFT's factors -> (linear, layer), for everything that the settings adapt."""
    linears, stacks = adaptable_modules(shape), {}
    for module in (FIRST, SECOND):
        if module not in settings.targets:
            continue
        for layer in linears[module].layers:
            if settings.adapts(module, layer):
                path = linears[module].stacked_path(layer).rsplit(".", 1)[0]
                inner = module == FIRST and settings.adapts(SECOND, layer)
                stacks[f"{path}.base_layer" if inner else path] = (linears[module], layer)
    return stacks


def write_stacked(adapters: AdapterTensors, settings: AdapterSettings, shape: ModelShape) -> dict[str, Tensor]:
    """PEFT's name (without its prefix) -> tensor, for the adapters of all experts."""
    tensors = {}
    for path, (linear, layer) in _stacks(settings, shape).items():
        factors = [_joined(adapters, settings, linear, linear.path(layer, e)) for e in range(linear.experts)]
        tensors[f"{path}.lora_A.weight"] = torch.cat([a for a, _ in factors])
        # [e, out, R] -> [out, R, e]
        tensors[f"{path}.lora_B.weight"] = torch.stack([b for _, b in factors]).permute(1, 2, 0).flatten(1)
    return tensors


def _joined(adapters: AdapterTensors, settings: AdapterSettings, linear: Adaptable, path: str) -> tuple[Tensor, Tensor]:
    """A [R, in] and B [out, R] of all parts of one expert's linear; parts of other scalings have theirs in B."""
    chosen = settings.targets[linear.module]
    parts = chosen or tuple(linear.parts)
    scaling, total, start = settings.scaling_of(linear.module, parts[0]), stacked_rank(settings, linear), 0
    some = adapters[path, parts[0]]
    rows = []
    for part, (_, out) in linear.parts.items():
        if part not in parts:
            rows.append(some.b.new_zeros(out, total))
            continue
        own = settings.scaling_of(linear.module, part)
        b = adapters[path, part].b if own == scaling else adapters[path, part].b * (own / scaling)
        rows.append(torch.nn.functional.pad(b, (start, total - start - b.shape[1])))
        start += b.shape[1] if chosen else 0
    a = torch.cat([adapters[path, part].a for part in parts]) if chosen else some.a
    return a, torch.cat(rows)


def read_stacked(
    tensors: Mapping[str, Tensor], settings: AdapterSettings, shape: ModelShape, origin: str
) -> tuple[AdapterTensors, set[str]]:
    """The adapters of experts, and the names of the tensors that they were in.

    Args:
        tensors: of a PEFT directory, without its prefix; those of single experts are left alone.
        origin: of the tensors, for messages.

    Raises:
        UserError: one factor is missing, or of another size.
    """
    adapters: AdapterTensors = {}
    read: set[str] = set()
    for path, (linear, layer) in _stacks(settings, shape).items():
        names = [f"{path}.lora_{factor}.weight" for factor in "AB"]
        there = [name for name in names if name in tensors]
        if not there:
            continue
        if len(there) == 1:
            raise UserError(f"lora: {origin} has only {there[0]}; legal: lora_A and lora_B; try: copy it again")
        adapters |= _taken_apart(*(tensors[name] for name in names), linear, layer, settings, origin)
        read |= set(names)
    return adapters, read


def _taken_apart(
    a: Tensor, b: Tensor, linear: Adaptable, layer: int, settings: AdapterSettings, origin: str
) -> AdapterTensors:
    outs, rank = [out for _, out in linear.parts.values()], stacked_rank(settings, linear)
    sizes = ((linear.experts * rank, linear.in_features), (sum(outs), rank * linear.experts))
    if (tuple(a.shape), tuple(b.shape)) != sizes or settings.targets[linear.module]:
        raise UserError(
            f"lora: the adapters of {linear.stacked_path(layer)} in {origin} are {tuple(a.shape)} and "
            f"{tuple(b.shape)}; legal for {linear.experts} experts of this model and rank {rank}: {sizes[0]} and "
            f"{sizes[1]}, for all of {linear.module}"
        )
    adapters: AdapterTensors = {}
    by_expert = b.unflatten(1, (rank, linear.experts)).permute(2, 0, 1)  # [e, out, R]
    for expert, (own_a, own_b) in enumerate(zip(a.chunk(linear.experts), by_expert)):
        for part, rows in zip(linear.parts, own_b.split(outs)):
            adapters[linear.path(layer, expert), part] = PartAdapter(own_a, rows.contiguous())
    return adapters
