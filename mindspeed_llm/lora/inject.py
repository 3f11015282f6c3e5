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
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.models.tensor_names import is_mtp, layer_index
from mindspeed_llm.plan.adaptable import adaptable_modules, module_of
from mindspeed_llm.plan.adapters import AdapterSettings

# A linear -> what it becomes.
ADAPTED: dict[type[nn.Module], type[LoraMixin]] = {
    ColumnParallelLinear: LoraColumnParallelLinear,
    RowParallelLinear: LoraRowParallelLinear,
}


def inject_adapters(model: nn.Module, settings: AdapterSettings, seed: int = 1234) -> list[str]:
    """Give every targeted linear of the model an adapter, initialised by (seed, name): A uniform, B zero.

    The linear itself becomes the adapted one (same parameters, same names), so weights can be loaded before or after
    (before, for DoRA's magnitudes).

    Returns:
        Names of the adapter parameters.

    Raises:
        UserError: a targeted linear cannot be adapted.
    """
    linears = adaptable_modules(model.config.shape)
    names: list[str] = []
    for path, module in model.named_modules():
        kind = module_of(path)
        if kind not in settings.targets or isinstance(module, LoraMixin):
            continue
        name = global_name(path, model.config, model.vp_stage, model.pp_group.rank())
        if not settings.adapts(kind, layer_of(name, model.config.shape)):
            continue
        module.__class__ = adapted_class(module, path)
        if settings.use_dora and module.weight.requires_grad:
            raise UserError(
                f"--use-dora: {path} is trained itself (--trainable), so its direction is not the adapter's alone; "
                "legal: --trainable for other parameters; try: leave --use-dora out"
            )
        module.add_adapter(linears[kind], settings)
        initialize_adapter(module, name, seed)
        names += [f"{path}.{n}" for n, _ in module.named_parameters() if n.startswith("lora_")]
    return names


def layer_of(path: str, shape: ModelShape) -> int:
    """The layer of a linear of the whole model, as Adaptable counts them; 0 outside the layers."""
    if is_mtp(path):
        return shape.num_layers + int(path.split(".")[2])
    return layer_index(path) or 0


def adapted_class(module: nn.Module, path: str) -> type[LoraMixin]:
    """The class that a linear with an adapter has.

    Raises:
        UserError: there is none.
    """
    for plain, adapted in ADAPTED.items():
        if isinstance(module, plain):
            return adapted
    raise UserError(
        f"lora: {path} is a {type(module).__name__}, which cannot be adapted; legal: linears; try: leave it out of "
        "--lora-target-modules"
    )


def adapted_modules(model: nn.Module) -> dict[str, LoraMixin]:
    """path -> adapted linear."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoraMixin)}


@torch.no_grad()
def initialize_adapter(module: LoraMixin, name: str, seed: int) -> None:
    """A as PEFT draws it (Kaiming uniform with a = sqrt(5): within 1 / sqrt(in)), whole and then cut; B zero.

    Magnitudes are those of the weight, which must be there.

    Args:
        name: of the linear in the whole model.
    """
    width = module.lora_A.shape[1] * (1 if module.kind.column else module.kind.world)
    parts = ("all",) if module.shares_a else module.adapter_parts
    ranks = [next(iter(module.ranks.values()))] if module.shares_a else list(module.ranks.values())
    drawn = torch.cat([draw_uniform(seed, f"{name}.lora_A/{p}", (r, width)) for p, r in zip(parts, ranks)])
    if not module.kind.column:
        drawn = drawn.chunk(module.kind.world, dim=1)[module.kind.group.rank()]
    module.lora_A.copy_(drawn)
    for factor in module.lora_B.values():
        factor.zero_()
    if module.uses_dora:
        # The norms of W, B being zero: at first the linear computes what it did.
        norms = module.split_rows(module.row_norms())
        for part, magnitude in module.lora_magnitude.items():
            magnitude.copy_(norms[part])


def draw_uniform(seed: int, name: str, shape: tuple[int, int]) -> Tensor:
    """fp32 numbers uniform within 1 / sqrt(columns), the same whatever else is drawn."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    bound = 1.0 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
