"""Recipes of low precision. They have names, so that code which mentions them imports, and are refused when made."""

from __future__ import annotations

import enum
from typing import Any

from mindspeed_llm.models.stand_ins.transformer_engine.refusal import refuse


class Format(enum.Enum):
    """8-bit formats by their largest value, forward and backward."""

    E4M3 = (448, 448)
    E5M2 = (57344, 57344)
    HYBRID = (448, 57344)


class Recipe:
    """A way to scale tensors to 8 or 4 bits."""

    def __init__(self, *args: Any, **kwargs: Any):
        raise refuse(f"the low-precision recipe {type(self).__name__}", "fp32, bf16 or fp16 without --fp8-format")


class DelayedScaling(Recipe):
    """8 bits with scales from earlier steps."""


class Float8CurrentScaling(Recipe):
    """8 bits with scales from the tensor itself."""


class Float8BlockScaling(Recipe):
    """8 bits with a scale for each block."""


class MXFP8BlockScaling(Recipe):
    """8 bits with power-of-two scales for each 32 elements."""
