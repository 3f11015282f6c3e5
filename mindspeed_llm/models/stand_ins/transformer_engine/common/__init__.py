"""Transformer Engine's framework-independent part: recipes of low precision."""

from mindspeed_llm.models.stand_ins.transformer_engine.common import recipe

__all__ = ["recipe"]
