"""Patches of megatron.core.utils."""

from __future__ import annotations

import functools
from collections.abc import Callable

from mindspeed_llm.patching import Patch


def _false_without_transformer_engine(original: Callable[..., bool]) -> Callable[..., bool]:
    from megatron.core.utils import get_te_version

    @functools.wraps(original)
    def is_te_min_version(version: str, check_equality: bool = True) -> bool:
        return get_te_version() is not None and original(version, check_equality)

    return is_te_min_version


PATCHES = (
    Patch(
        name="te-version-without-te",
        target="megatron.core.utils:is_te_min_version",
        why="without Transformer Engine it compares None with a version and raises TypeError instead of answering no",
        wrap=_false_without_transformer_engine,
        fingerprints={"0.16.1": "b70b4a3a1792"},
    ),
)
