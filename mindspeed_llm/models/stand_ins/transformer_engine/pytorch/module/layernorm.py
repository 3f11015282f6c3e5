"""Where Transformer Engine has its LayerNorm."""

from mindspeed_llm.models.stand_ins.transformer_engine.pytorch.norm import LayerNorm

__all__ = ["LayerNorm"]
