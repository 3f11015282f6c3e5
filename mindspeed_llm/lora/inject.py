"""Put adapters into a built model."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from mindspeed_llm.errors import UserError
from mindspeed_llm.lora.layers import LoraColumnParallelLinear, LoraMixin, LoraRowParallelLinear
from mindspeed_llm.models.initialize import global_name
from mindspeed_llm.models.linear import ColumnParallelLinear, RowParallelLinear
from mindspeed_llm.plan.adapters import AdapterSettings


def inject_adapters(model: nn.Module, settings: AdapterSettings, seed: int = 1234) -> list[str]:
    """Give every targeted linear of the model an adapter, initialised by (seed, name): A uniform, B zero.

    The linear itself becomes the adapted one (same parameters, same names), so weights can be loaded before or after.

    Returns:
        Names of the adapter parameters.

    Raises:
        UserError: a target matches no linear.
    """
    found: set[str] = set()
    names: list[str] = []
    for path, module in model.named_modules():
        kind = path.rsplit(".", 1)[-1]
        if kind not in settings.targets or isinstance(module, LoraMixin):
            continue
        if not isinstance(module, ColumnParallelLinear | RowParallelLinear):
            raise UserError(
                f"lora: {path} is a {type(module).__name__}, which cannot be adapted; legal: linears; try: leave "
                "it out of --lora-target-modules"
            )
        found.add(kind)
        adapted = LoraColumnParallelLinear if isinstance(module, ColumnParallelLinear) else LoraRowParallelLinear
        module.__class__ = adapted
        module.add_adapter(kind, settings)
        initialize_adapter(module, global_name(path, model.config, model.vp_stage, model.pp_group.rank()), seed)
        names += [f"{path}.{n}" for n, _ in module.named_parameters() if n.startswith("lora_")]
    if missing := sorted(set(settings.targets) - found):
        raise UserError(
            f"lora: targets {missing} match no linear of this model; legal: linear_qkv, linear_proj, linear_fc1, "
            "linear_fc2 and their parts"
        )
    return names


def adapted_modules(model: nn.Module) -> dict[str, LoraMixin]:
    """path -> adapted linear."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoraMixin)}


@torch.no_grad()
def initialize_adapter(module: LoraMixin, name: str, seed: int) -> None:
    """A as PEFT draws it (Kaiming uniform with a = sqrt(5): within 1 / sqrt(in)), whole and then cut; B zero.

    Args:
        name: of the linear in the whole model.
    """
    width = module.lora_A.shape[1] * (1 if module.kind.column else module.kind.world)
    parts = ("all",) if module.shares_a else module.adapter_parts
    drawn = torch.cat([draw_uniform(seed, f"{name}.lora_A/{p}", (module.rank, width)) for p in parts])
    if not module.kind.column:
        drawn = drawn.chunk(module.kind.world, dim=1)[module.kind.group.rank()]
    module.lora_A.copy_(drawn)
    for factor in module.lora_B.values():
        factor.zero_()


def draw_uniform(seed: int, name: str, shape: tuple[int, int]) -> Tensor:
    """fp32 numbers uniform within 1 / sqrt(columns), the same whatever else is drawn."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    bound = 1.0 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
