"""Patches of megatron.core.dist_checkpointing.strategies.torch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from mindspeed_llm.patching import Patch


def _with_the_path_of_metadata(original: Callable[..., None]) -> Callable[..., None]:
    from megatron.core.dist_checkpointing.strategies import torch as strategies

    @functools.wraps(original)
    def remove_sharded_tensors(self: Any, checkpoint_dir: str, key_prefix: str) -> None:
        plain = strategies.FileSystemWriter
        if hasattr(plain, "metadata_path"):
            return original(self, checkpoint_dir, key_prefix)

        class WithPath(plain):
            metadata_path = property(plain._get_metadata_path)

        strategies.FileSystemWriter = WithPath
        try:
            return original(self, checkpoint_dir, key_prefix)
        finally:
            strategies.FileSystemWriter = plain

    return remove_sharded_tensors


PATCHES = (
    Patch(
        name="metadata-path-of-torch-dist",
        target="megatron.core.dist_checkpointing.strategies.torch:TorchDistLoadShardedStrategy.remove_sharded_tensors",
        why="it asks torch's file writer for metadata_path, which torch has dropped (2.13 has not got it)",
        wrap=_with_the_path_of_metadata,
        fingerprints={"0.15.3": "c17c3b9c5d50", "0.16.1": "c17c3b9c5d50"},
    ),
)
