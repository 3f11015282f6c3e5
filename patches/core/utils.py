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


def _false_without_the_package(original: Callable[..., bool]) -> Callable[..., bool]:
    @functools.wraps(original)
    def is_min_version(version: str, check_equality: bool = True) -> bool:
        try:
            return original(version, check_equality)
        except ModuleNotFoundError:
            return False

    return is_min_version


WHY = "without {} it fails to import it instead of answering no, also where a program only asks what it can use"
PATCHES = (
    Patch(
        name="te-version-without-te",
        target="megatron.core.utils:is_te_min_version",
        why="without Transformer Engine it compares None with a version and raises TypeError instead of answering no",
        wrap=_false_without_transformer_engine,
        fingerprints={"0.15.3": "b70b4a3a1792", "0.16.1": "b70b4a3a1792"},
    ),
    Patch(
        name="flash-attn-version-without-it",
        target="megatron.core.utils:is_fa_min_version",
        why=WHY.format("flash-attn"),
        wrap=_false_without_the_package,
        fingerprints={"0.15.3": "3391a320a8c4", "0.16.1": "3391a320a8c4"},
    ),
    Patch(
        name="mamba-version-without-it",
        target="megatron.core.utils:is_mamba_min_version",
        why=WHY.format("mamba-ssm"),
        versions=">=0.16",
        wrap=_false_without_the_package,
        fingerprints={"0.16.1": "e2c2778f9d10"},
    ),
)
