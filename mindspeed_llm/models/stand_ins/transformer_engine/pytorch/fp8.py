"""The state of 8-bit computation: never on."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

from mindspeed_llm.models.stand_ins.transformer_engine.refusal import refuse

REASON = "Transformer Engine is not installed"


class FP8GlobalStateManager:
    """Answers of a machine without 8-bit kernels."""

    @classmethod
    def is_fp8_available(cls) -> tuple[bool, str]:
        """Whether there are kernels, and why not."""
        return False, REASON

    @classmethod
    def is_mxfp8_available(cls) -> tuple[bool, str]:
        """Whether there are kernels, and why not."""
        return False, REASON

    @classmethod
    def is_fp8_block_scaling_available(cls) -> tuple[bool, str]:
        """Whether there are kernels, and why not."""
        return False, REASON

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        """Whether an autocast region with 8 bits is open."""
        return False

    @classmethod
    def is_fp8_calibration(cls) -> bool:
        """Whether scales are being measured."""
        return False

    @classmethod
    def get_fp8_recipe(cls) -> None:
        """The recipe of the open region: none."""

    @classmethod
    def reset(cls) -> None:
        """There is no state to reset."""


def check_fp8_support() -> tuple[bool, str]:
    """Whether there are kernels, and why not."""
    return False, REASON


def fp8_autocast(enabled: bool = True, **_recipe: Any) -> AbstractContextManager:
    """A region of 8-bit computation, which can only be off.

    Raises:
        UserError: it is to be on.
    """
    if enabled:
        raise refuse("fp8_autocast(enabled=True)", "enabled=False")
    return contextlib.nullcontext()


def fp8_model_init(enabled: bool = True, **_recipe: Any) -> AbstractContextManager:
    """A region in which parameters are made in 8 bits, which can only be off.

    Raises:
        UserError: it is to be on.
    """
    if enabled:
        raise refuse("fp8_model_init(enabled=True)", "enabled=False")
    return contextlib.nullcontext()


class Fp8Padding:
    """Rows of experts filled up to what 8-bit kernels take.

    Raises:
        UserError: there are no such kernels here.
    """

    def __init__(self, *_sizes: Any) -> None:
        raise refuse(type(self).__name__, "experts in fp32, bf16 or fp16")


class Fp8Unpadding(Fp8Padding):
    """The inverse of `Fp8Padding`."""
