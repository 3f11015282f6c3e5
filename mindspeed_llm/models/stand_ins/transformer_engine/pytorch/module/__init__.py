"""What Transformer Engine's modules have in common."""

from mindspeed_llm.models.stand_ins.transformer_engine.pytorch.module import base

__all__ = ["base"]
