"""What is changed in megatron-core and why, one file per changed module, laid out like megatron-core itself."""

from __future__ import annotations

from mindspeed_llm.patches.core import utils
from mindspeed_llm.patches.core.tensor_parallel import layers
from mindspeed_llm.patches.core.transformer import dot_product_attention, torch_norm
from mindspeed_llm.patching import Patch


def catalogue() -> tuple[Patch, ...]:
    """Every patch of this package."""
    return (*utils.PATCHES, *layers.PATCHES, *torch_norm.PATCHES, *dot_product_attention.PATCHES)
