"""Put adapters into a built model."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from mindspeed_llm.errors import UserError
from mindspeed_llm.lora.experts import ADAPTED as ADAPTED_EXPERTS
from mindspeed_llm.lora.experts import WEIGHTS, ExpertFactors
from mindspeed_llm.lora.initial import initial_a
from mindspeed_llm.lora.layers import LoraColumnParallelLinear, LoraMixin, LoraRowParallelLinear
from mindspeed_llm.lora.replicated import LoraReplicatedLinear, LoraRouter
from mindspeed_llm.lora.vocabulary import LoraEmbedding, LoraOutputLayer, LoraVocabularyMixin
from mindspeed_llm.models.initialize import global_name
from mindspeed_llm.models.latent_attention import ReplicatedLinear
from mindspeed_llm.models.linear import ColumnParallelLinear, RowParallelLinear
from mindspeed_llm.models.moe.experts import ExpertLinear, Experts
from mindspeed_llm.models.moe.router import Router
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.models.tensor_names import is_mtp, layer_index
from mindspeed_llm.plan.adaptable import adaptable_modules, module_of
from mindspeed_llm.plan.adapters import AdapterSettings

# A linear -> what it becomes.
ADAPTED: dict[type[nn.Module], type[LoraMixin]] = {
    ColumnParallelLinear: LoraColumnParallelLinear,
    RowParallelLinear: LoraRowParallelLinear,
    ReplicatedLinear: LoraReplicatedLinear,
    Router: LoraRouter,
}
# By megatron-core's name: an output layer is of the same class as other linears there.
OF_VOCABULARY = {"word_embeddings": LoraEmbedding, "output_layer": LoraOutputLayer}
Adapted = LoraMixin | LoraVocabularyMixin | ExpertFactors


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
    for path, module in [*model.named_modules()]:
        if isinstance(module, Experts):
            names += inject_into_experts(model, path, module, settings, seed)
            continue
        kind = module_of(path)
        if kind not in settings.targets or isinstance(module, Adapted | ExpertLinear):
            continue
        name = global_name(path, model.config, model.vp_stage, model.pp_group.rank())
        if not settings.adapts(kind, layer_of(name, model.config.shape)):
            continue
        if kind in OF_VOCABULARY:
            module.__class__ = OF_VOCABULARY[kind]
            module.add_adapter(linears[kind], settings)
            module.initialize_adapter(name, seed)
            names += [f"{path}.{n}" for n, _ in module.named_parameters() if n.startswith("lora_")]
            continue
        module.__class__ = adapted_class(module, path)
        module.add_adapter(linears[kind], settings)
        initialize_adapter(module, name, seed)
        names += [f"{path}.{n}" for n, _ in module.named_parameters() if n.startswith("lora_")]
    return names


def inject_into_experts(
    model: nn.Module, path: str, experts: Experts, settings: AdapterSettings, seed: int
) -> list[str]:
    """Give the targeted linears of all local experts of a layer adapters; returns the names of their parameters."""
    linears, names = adaptable_modules(model.config.shape), []
    whole = global_name(path + ".", model.config, model.vp_stage, model.pp_group.rank())
    for name in WEIGHTS:
        kind = f"experts.{name}"
        if kind not in settings.targets or hasattr(experts, name):
            continue
        if not settings.adapts(kind, layer_of(whole, model.config.shape)):
            continue
        if type(experts) in ADAPTED_EXPERTS:
            experts.__class__ = ADAPTED_EXPERTS[type(experts)]
        factors = experts.add_adapter(linears[kind], settings)
        factors.initialize_adapter(whole + name, seed)
        if factors.uses_dora:
            factors.initialize_magnitudes(factors.row_norms(partial(experts.dense_weight, name)))
        names += [f"{path}.{name}.{n}" for n, _ in factors.named_parameters()]
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


def adapted_modules(model: nn.Module) -> dict[str, Adapted]:
    """path -> adapted linear, or the adapters of one kind of linear of all local experts of a layer."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Adapted)}


@torch.no_grad()
def initialize_adapter(module: LoraMixin, name: str, seed: int) -> None:
    """A drawn whole and then cut (see `lora.initial`); B zero.

    Magnitudes are those of the weight, which must be there.

    Args:
        name: of the linear in the whole model.
    """
    width = module.lora_A.shape[1] * (1 if module.kind.column else module.kind.world)
    ranks = {"all": next(iter(module.ranks.values()))} if module.shares_a else module.ranks
    drawn = initial_a(name, ranks, width, seed)
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
