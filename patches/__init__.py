"""What is changed in megatron-core and why, one file per changed module, laid out like megatron-core itself."""

from __future__ import annotations

from mindspeed_llm.patches.core import utils
from mindspeed_llm.patching import Patch


def catalogue() -> tuple[Patch, ...]:
    """Every patch of this package."""
    return utils.PATCHES
