"""Weights are read from what megatron-core itself saves, in any layout, without megatron."""

import pickle
import shutil
import subprocess
import sys

import pytest
import torch

from mindspeed_llm.checkpoint.convert import convert
from mindspeed_llm.checkpoint.detect import detect, open_source
from mindspeed_llm.checkpoint.hf import HfSource
from mindspeed_llm.checkpoint.torch_dist import TorchDistSource
from mindspeed_llm.errors import UserError
from mindspeed_llm.testing.pool import pool


def save(hf_dir, directory, tp, pp):
    """On every rank: build, fill, save with megatron-core."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    from mindspeed_llm.checkpoint.load import Placement, load_into
    from mindspeed_llm.models.build import BuildOptions, build_model
    from mindspeed_llm.parallel.layer_map import layer_map
    from mindspeed_llm.parallel.setup import initialize_distributed

    initialize_distributed(tp, pp)
    source = HfSource(hf_dir)
    model = build_model(
        source.shape, BuildOptions(tensor_parallel_size=tp, pipeline_parallel_size=pp, initialize=False)
    )
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    pp_rank = parallel_state.get_pipeline_model_parallel_rank()
    load_into(model, source, Placement(layer_map(source.shape.num_layers, pp), tp_rank, tp, pp_rank), quiet=True)
    if dist.get_rank() == 0:
        directory.mkdir(parents=True)
    dist.barrier()
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    dist_checkpointing.save({"model": model.sharded_state_dict()}, str(directory), strategy)


@pytest.fixture(scope="module")
def saved(toys, tmp_path_factory):
    """layout -> (toy, checkpoint directory)."""
    root = tmp_path_factory.mktemp("torch_dist")
    found = {}
    for toy, tp, pp in (("llama-biased", 2, 1), ("qwen3-tied", 1, 2)):
        directory = root / f"{toy}-tp{tp}-pp{pp}" / "iter_0000007"
        pool(2).run(save, toys[toy], directory, tp, pp)
        (directory.parent / "latest_checkpointed_iteration.txt").write_text("7")
        found[f"tp{tp}pp{pp}"] = (toys[toy], directory)
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["tp2pp1", "tp1pp2"])
def test_every_tensor_and_every_slice_is_read_back(saved, layout):
    toy, directory = saved[layout]
    reference = HfSource(toy)
    source = TorchDistSource(directory, reference.shape)
    for name in reference.names():
        assert torch.equal(source.read(name), reference.read(name)), name
        assert source.dtype(name) == torch.float32
        for rank in range(4):
            assert torch.equal(source.read_shard(name, rank, 4), reference.read_shard(name, rank, 4)), name


@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["tp2pp1", "tp1pp2"])
def test_it_converts_to_both_other_formats(saved, layout, tmp_path, same_tensors):
    toy, directory = saved[layout]
    found = detect(directory.parent)
    assert (found.format, found.iteration) == ("torch_dist", 7)
    with pytest.raises(UserError, match="records no architecture"):
        open_source(found)
    convert(directory.parent, tmp_path / "hf", "mg", "hf", hf_cfg_dir=toy, quiet=True)
    same_tensors(toy, tmp_path / "hf")
    out = convert(directory.parent, tmp_path / "mg", tp=2, pp=2, hf_cfg_dir=toy, quiet=True)
    assert out.name == "iter_0000007"
    convert(tmp_path / "mg", tmp_path / "back", save_type="hf", quiet=True)
    same_tensors(toy, tmp_path / "back")


@pytest.mark.slow
@pytest.mark.distributed
def test_reading_needs_no_megatron(saved):
    toy, directory = saved["tp2pp1"]
    program = (
        "import sys; from mindspeed_llm.checkpoint.hf import HfSource; "
        "from mindspeed_llm.checkpoint.torch_dist import TorchDistSource; "
        "s = TorchDistSource(sys.argv[2], HfSource(sys.argv[1]).shape); [s.read(n) for n in s.names()]; "
        "sys.exit('megatron' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, toy, directory], check=True)


@pytest.mark.distributed
def test_damage_is_named(saved, toys, tmp_path):
    toy, directory = saved["tp2pp1"]
    shape = HfSource(toy).shape
    with pytest.raises(UserError, match="16 unexpected"):
        TorchDistSource(directory, HfSource(toys["llama"]).shape)
    copy = tmp_path / "iter_0000007"
    shutil.copytree(directory, copy)
    lost = next(copy.glob("__1_*.distcp"))
    lost.unlink()
    source = TorchDistSource(copy, shape)
    with pytest.raises(UserError, match=f"{lost.name} cannot be read"):
        [source.read(name) for name in source.names()]
    (copy / ".metadata").write_bytes(b"\x80\x04")
    with pytest.raises(UserError, match="metadata cannot be read"):
        TorchDistSource(copy, shape)


def test_metadata_cannot_run_code(toys, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="not part of checkpoint metadata"):
        TorchDistSource(tmp_path, HfSource(toys["llama"]).shape)
    assert not (tmp_path / "ran").exists()
