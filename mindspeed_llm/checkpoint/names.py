"""Parameter names in Megatron checkpoints: spellings of one tensor, and entries that are no weights."""

from __future__ import annotations

import re

from mindspeed_llm.checkpoint.expert_files import sequential_name

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"

# Transformer Engine's layers own the norm in front of them, so its weight moves into the linear's name.
_FUSED_NORMS = (
    ("self_attention.linear_qkv.layer_norm_", "input_layernorm."),
    ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."),
)
_LAYER_PREFIX = re.compile(r"(decoder\.layers\.\d+\.)(.*)")


def plain_name(name: str) -> str:
    """The local-spec spelling of a tensor that may be spelled as Transformer Engine's layers (or experts) do."""
    match = _LAYER_PREFIX.match(name)
    if match:
        for fused, plain in _FUSED_NORMS:
            if match.group(2).startswith(fused):
                return match.group(1) + plain + match.group(2).removeprefix(fused)
    return sequential_name(name)


def fused_name(name: str) -> str:
    """The inverse of `plain_name`: how a model of Transformer Engine layers calls the tensor."""
    match = _LAYER_PREFIX.match(name)
    if match:
        for fused, plain in _FUSED_NORMS:
            if match.group(2).startswith(plain):
                return match.group(1) + fused + match.group(2).removeprefix(plain)
    return name


def is_extra_state(name: str) -> bool:
    """Whether an entry is module state of Transformer Engine (fp8 scales), which no weight depends on."""
    return name.endswith("_extra_state")
