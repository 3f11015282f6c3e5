"""Patches of megatron.legacy.fused_kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from mindspeed_llm.patching import Patch


def _nothing_without_the_toolkit(original: Callable[[Any], None]) -> Callable[[Any], None]:
    from torch.utils import cpp_extension

    @functools.wraps(original)
    def load(args: Any) -> None:
        if cpp_extension.CUDA_HOME is not None:
            original(args)

    return load


PATCHES = (
    Patch(
        name="fused-kernels-without-cuda",
        target="megatron.legacy.fused_kernels:load",
        why="it asks nvcc for its version and fails where there is none, although it compiles nothing any more",
        wrap=_nothing_without_the_toolkit,
        fingerprints={"0.15.3": "67264d957c82", "0.16.1": "67264d957c82"},
        needs="megatron.legacy",
    ),
)
