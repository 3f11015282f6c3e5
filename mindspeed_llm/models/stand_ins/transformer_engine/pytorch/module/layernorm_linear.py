"""Where Transformer Engine has its LayerNormLinear."""

from mindspeed_llm.models.stand_ins.transformer_engine.pytorch.linear import LayerNormLinear

__all__ = ["LayerNormLinear"]
