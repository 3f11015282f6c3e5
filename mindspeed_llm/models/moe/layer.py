"""The layer with experts as megatron-core's TransformerLayer takes it: its MoELayer and dispatchers, our parts."""

from __future__ import annotations

from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn

from mindspeed_llm.models.config import ModelConfig
from mindspeed_llm.models.moe.experts import GroupedExperts, SequentialExperts
from mindspeed_llm.models.moe.overlap import OverlappedMoELayer
from mindspeed_llm.models.moe.router import Router
from mindspeed_llm.models.moe.shared_experts import SharedExperts


def moe_specification(config: ModelConfig) -> ModuleSpec:
    """A layer's `mlp` module: router, routed experts and, if any, shared ones."""
    return ModuleSpec(
        module=OverlappedMoELayer if config.expert_overlap else MoELayer,
        submodules=MoESubmodules(
            experts=GroupedExperts if config.moe_grouped_gemm else SequentialExperts,
            shared_experts=SharedExperts,
            router=Router,
        ),
    )


def forget_micro_batches(model: nn.Module) -> None:
    """Let every layer with experts of a model drop a micro-batch's graph once it is through.

    megatron's dispatcher keeps the routing weights until the next call, and with them the graph, which refers to the
    model in ways that Python's garbage collection cannot see: a model that is not used any more was never freed.
    """
    for layer in model.modules():
        if isinstance(layer, MoELayer):
            layer.register_forward_hook(_forget)


def _forget(layer: MoELayer, *_: object) -> None:
    dispatcher = layer.token_dispatcher
    for name, value in vars(dispatcher).items():
        if isinstance(value, Tensor) and value.requires_grad:
            setattr(dispatcher, name, None)
