"""Tensors can be taken out of a saved checkpoint though torch's file writer no longer says where its metadata is."""

import os

import pytest
import torch

from mindspeed_llm.testing.pool import pool

NAME = "metadata-path-of-torch-dist"


def kept_and_read(path, patched):
    """Files, and tensors by the metadata, of a checkpoint of `kept` and `extra.gone` after `extra` was taken out."""
    from megatron.core.dist_checkpointing import ShardedTensor, remove_sharded_tensors, save
    from megatron.core.dist_checkpointing.strategies import torch as strategies
    from torch.distributed.checkpoint import FileSystemReader

    from mindspeed_llm import accelerator, patches, patching
    from mindspeed_llm.accelerator import torch_facade

    torch_facade.install(accelerator.current())
    patches.apply()
    if not patched:
        patching.undo([NAME])
    try:
        state = {key: ShardedTensor.from_rank_offsets(key, torch.ones(2, 3)) for key in ("kept", "extra.gone")}
        save(state, path, strategies.TorchDistSaveShardedStrategy("torch_dist", 1, separation_hint="extra"))
        remove_sharded_tensors(path, key_prefix="extra")
        assert not hasattr(strategies.FileSystemWriter, "metadata_path")  # torch's own, as before
        read = FileSystemReader(path).read_metadata().state_dict_metadata
        return {name for name in os.listdir(path) if name.startswith("extra")}, set(read)
    finally:
        patches.apply()


def test_what_has_the_prefix_is_gone(tmp_path):
    assert pool(1).run(kept_and_read, tmp_path, True) == [(set(), {"kept"})]


def test_without_the_patch_it_fails(tmp_path):
    with pytest.raises(AttributeError, match="metadata_path"):
        pool(1).run(kept_and_read, tmp_path, False)
