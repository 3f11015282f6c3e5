"""Transformer Engine's attention and rotary embedding."""

from mindspeed_llm.models.stand_ins.transformer_engine.pytorch.attention.dot_product import DotProductAttention
from mindspeed_llm.models.stand_ins.transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb

__all__ = ["DotProductAttention", "apply_rotary_pos_emb"]
