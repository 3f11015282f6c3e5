"""Where Transformer Engine has its Linear."""

from mindspeed_llm.models.stand_ins.transformer_engine.pytorch.linear import Linear

__all__ = ["Linear"]
