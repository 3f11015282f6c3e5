"""The layer with experts as megatron-core's TransformerLayer takes it: its MoELayer and dispatchers, our parts."""

from __future__ import annotations

from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

from mindspeed_llm.models.config import ModelConfig
from mindspeed_llm.models.moe.experts import GroupedExperts, SequentialExperts
from mindspeed_llm.models.moe.router import Router
from mindspeed_llm.models.moe.shared_experts import SharedExperts


def moe_specification(config: ModelConfig) -> ModuleSpec:
    """A layer's `mlp` module: router, routed experts and, if any, shared ones."""
    return ModuleSpec(
        module=MoELayer,
        submodules=MoESubmodules(
            experts=GroupedExperts if config.moe_grouped_gemm else SequentialExperts,
            shared_experts=SharedExperts,
            router=Router,
        ),
    )
