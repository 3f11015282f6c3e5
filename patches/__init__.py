"""What is changed in megatron-core and why, one file per changed module, laid out like megatron-core itself."""

from __future__ import annotations

from typing import Any

from mindspeed_llm import patching
from mindspeed_llm.patches.core import parallel_state, utils
from mindspeed_llm.patches.core.datasets import utils as dataset_utils
from mindspeed_llm.patches.core.dist_checkpointing.strategies import torch as dist_strategies
from mindspeed_llm.patches.core.distributed import data_parallel_base
from mindspeed_llm.patches.core.fusions import (
    fused_indices_converter,
    fused_mla_yarn_rope_apply,
    fused_pad_routing_map,
)
from mindspeed_llm.patches.core.inference.contexts.attention_context.triton import tensor_ops
from mindspeed_llm.patches.core.optimizer import distrib_optimizer, hybrid_optimizer
from mindspeed_llm.patches.core.tensor_parallel import layers, mappings, random
from mindspeed_llm.patches.core.transformer import dot_product_attention, torch_norm
from mindspeed_llm.patches.core.transformer.custom_layers import batch_invariant_kernels
from mindspeed_llm.patches.core.transformer.experimental_attention_variant import dsa
from mindspeed_llm.patches.core.transformer.moe import moe_utils
from mindspeed_llm.patches.legacy import fused_kernels
from mindspeed_llm.patching import Patch


def catalogue() -> tuple[Patch, ...]:
    """Every patch of this package."""
    modules = (
        utils,
        parallel_state,
        dataset_utils,
        dist_strategies,
        data_parallel_base,
        fused_indices_converter,
        fused_mla_yarn_rope_apply,
        fused_pad_routing_map,
        layers,
        mappings,
        random,
        distrib_optimizer,
        hybrid_optimizer,
        torch_norm,
        dot_product_attention,
        batch_invariant_kernels,
        dsa,
        tensor_ops,
        moe_utils,
        fused_kernels,
    )
    return tuple(patch for module in modules for patch in module.PATCHES)


def apply(config: Any = None) -> list[str]:
    """Put the catalogue in force: what has no condition and, where `config` is given, what its condition allows.

    Returns:
        Names of the patches newly applied.
    """
    return patching.apply(catalogue(), config)
