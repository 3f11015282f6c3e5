"""Patches of megatron.core.datasets.utils."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

from mindspeed_llm.patching import Patch


def _only_when_absent(original: Callable[[], None]) -> Callable[[], None]:
    @functools.wraps(original)
    def compile_helpers() -> None:
        if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
            original()

    return compile_helpers


PATCHES = (
    Patch(
        name="helpers-compiled-once",
        target="megatron.core.datasets.utils:compile_helpers",
        why="it ends the program without make, compiler or pybind11, also where the helpers were built before",
        wrap=_only_when_absent,
        fingerprints={"0.15.3": "02c160f0fa9c", "0.16.1": "02c160f0fa9c"},
    ),
)
