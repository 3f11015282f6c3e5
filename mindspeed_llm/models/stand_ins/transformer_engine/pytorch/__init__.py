"""Transformer Engine's modules."""

from mindspeed_llm.models.stand_ins.transformer_engine.pytorch import (
    attention,
    cpp_extensions,
    cross_entropy,
    distributed,
    fp8,
    module,
    ops,
    optimizers,
    permutation,
    router,
    tensor,
)
from mindspeed_llm.models.stand_ins.transformer_engine.pytorch.attention import DotProductAttention
from mindspeed_llm.models.stand_ins.transformer_engine.pytorch.distributed import checkpoint
from mindspeed_llm.models.stand_ins.transformer_engine.pytorch.fp8 import (
    Fp8Padding,
    Fp8Unpadding,
    fp8_autocast,
    fp8_model_init,
)
from mindspeed_llm.models.stand_ins.transformer_engine.pytorch.grouped_linear import GroupedLinear
from mindspeed_llm.models.stand_ins.transformer_engine.pytorch.linear import LayerNormLinear, Linear
from mindspeed_llm.models.stand_ins.transformer_engine.pytorch.norm import LayerNorm, RMSNorm
from mindspeed_llm.models.stand_ins.transformer_engine.pytorch.transformer import LayerNormMLP, TransformerLayer

__all__ = [
    "DotProductAttention",
    "Fp8Padding",
    "Fp8Unpadding",
    "GroupedLinear",
    "LayerNorm",
    "LayerNormLinear",
    "LayerNormMLP",
    "Linear",
    "RMSNorm",
    "TransformerLayer",
    "attention",
    "checkpoint",
    "cpp_extensions",
    "cross_entropy",
    "distributed",
    "fp8",
    "fp8_autocast",
    "fp8_model_init",
    "module",
    "ops",
    "optimizers",
    "permutation",
    "router",
    "tensor",
]
