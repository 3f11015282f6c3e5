"""A training state survives a checkpoint bit by bit, at any layout, and no rank holds more than its share meanwhile."""

import os
import threading
import zlib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mindspeed_llm.checkpoint.toy import make_toy
from mindspeed_llm.errors import UserError
from mindspeed_llm.testing.pool import pool

PP2, TP2 = "--pipeline-model-parallel-size 2", "--tensor-model-parallel-size 2"
SHARED = "--use-distributed-optimizer"
CUT = "--use-torch-fsdp2"
EP2 = "--expert-model-parallel-size 2"
# name -> (processes, options)
LAYOUTS = {
    "one": (1, ""),
    "tp2": (2, f"{TP2} --sequence-parallel"),
    "pp2": (2, f"{PP2} --num-layer-list 1,3"),
    "dp2": (2, ""),
    "dp2 shared": (2, SHARED),
    "dp4 shared": (4, SHARED),
    "dp2 cut": (2, CUT),
    "dp4 cut": (4, CUT),
    "tp2 dp2 shared": (4, f"{TP2} --sequence-parallel {SHARED}"),
}
EXPERT_LAYOUTS = {
    "one": (1, ""),
    "ep2": (2, EP2),
    "ep2 shared grouped": (2, f"{EP2} {SHARED} --moe-grouped-gemm"),
    "tp2 etp1 shared": (4, f"{TP2} --sequence-parallel --expert-tensor-parallel-size 1 {SHARED}"),
    "dp2 cut grouped": (2, f"{CUT} --moe-grouped-gemm"),
    "pp2 ep2": (4, f"{PP2} {EP2}"),
}
VOCABULARY = 997
# Seconds; the machine may be shared.
LONG = 300.0
FLAGS = (
    "--data-path none --lr 1e-4 --global-batch-size 4 --seq-length 64 --eval-iters 0 --num-threads 1 --train-iters 9"
)


def build(toy, options):
    """(chunks, optimizer, what is trained if that is not all) of a run at a layout, as the training door makes them."""
    from mindspeed_llm.config.parser import parse
    from mindspeed_llm.plan.plan import resolve
    from mindspeed_llm.training.run import make_optimizer
    from mindspeed_llm.training.setup import build, start_processes

    here = {"WORLD_SIZE": dist.get_world_size(), "RANK": dist.get_rank(), "LOCAL_WORLD_SIZE": dist.get_world_size()}
    os.environ.update({k: str(v) for k, v in here.items()})
    plan = resolve(parse("posttrain", f"{FLAGS} --load {toy} {options}".split()).config, [])
    start_processes(plan)
    model = build(plan)
    optimizer, _ = make_optimizer(plan, model, 9)
    return model.chunks, optimizer, model.trained if plan.adapters is not None else None


def state_of(built):
    """The state of what `build` made."""
    from mindspeed_llm.checkpoint.training_state import rng_states, training_state

    chunks, optimizer, only = built
    return training_state(chunks, optimizer, None, only, rng=rng_states())


def truth(box):
    """Values of a box that follow from its name and place alone, so that they are the same at any layout."""
    rows = 2048 if box.flexible else box.global_shape[0] if box.global_shape else 0
    shape = (rows, *box.global_shape[1:]) if box.global_shape else ()
    # A weight that is held in fp32 alone is saved rounded too.
    generator = torch.Generator().manual_seed(zlib.crc32(box.key.removeprefix("optimizer.state.fp32_param.").encode()))
    whole = torch.randn(shape, generator=generator)
    if box.flexible:
        whole[VOCABULARY:] = 0
    return whole[tuple(slice(at, at + size) for at, size in zip(box.offsets, box.shape))].to(box.tensor.dtype)


def order(root, iteration=1):
    """A plain order."""
    from mindspeed_llm.checkpoint.train_save import SaveOrder

    return SaveOrder(root, iteration, {"format": "torch_dist"})


def save(toy, options, root):
    """Fill the state with the truth and save it."""
    from mindspeed_llm.checkpoint.optimizer_state import set_optimizer_step
    from mindspeed_llm.checkpoint.train_save import save_training

    torch.set_num_threads(1)
    built = build(toy, options)
    state = state_of(built)
    for box in state.boxes:
        box.tensor.copy_(truth(box))
    set_optimizer_step(built[1], 5)
    return str(save_training(order(root), state_of(built)))


def load(toy, options, directories):
    """[keys of boxes that differ from the truth] for each directory, after loading it at this layout."""
    from mindspeed_llm.checkpoint.train_save import load_training

    torch.set_num_threads(1)
    built = build(toy, options)
    wrong = []
    for directory in directories:
        state = state_of(built)
        state.objects = {}  # random states belong to one layout
        for box in state.boxes:
            box.tensor.fill_(7)
        common = load_training(Path(directory), state)
        assert common["optimizer_step"] == 5
        assert any("exp_avg_sq" in box.key for box in state.boxes)
        wrong.append(sorted({box.key for box in state.boxes if not torch.equal(box.tensor, truth(box))}))
    return wrong


def relay(toy, options, layouts, tmp_path):
    """Every layout reads what every layout wrote: {(reader, writer): wrong keys on any rank}."""
    written = {
        name: pool(n).run(save, toy, f"{options} {flags}", tmp_path / name, timeout=LONG)[0]
        for name, (n, flags) in layouts.items()
    }
    found = {}
    for name, (processes, flags) in layouts.items():
        ranks = pool(processes).run(load, toy, f"{options} {flags}", list(written.values()), timeout=LONG)
        for number, writer in enumerate(written):
            found[name, writer] = sorted({key for rank in ranks for key in rank[number]})
    return found, {name: Path(path) for name, path in written.items()}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return make_toy("llama", tmp_path_factory.mktemp("toy") / "llama")


@pytest.fixture(scope="module")
def expert_toy(tmp_path_factory):
    return make_toy("mixtral", tmp_path_factory.mktemp("toy") / "mixtral")


@pytest.mark.parametrize(
    "options, names", [("--bf16", tuple(LAYOUTS)), ("--lora-r 4", ("tp2", "pp2", "dp2", "dp2 shared", "dp2 cut"))]
)
def test_every_layout_reads_what_every_layout_wrote(toy, tmp_path, options, names):
    found, written = relay(toy, options, {name: LAYOUTS[name] for name in names}, tmp_path)
    assert len(found) == len(names) ** 2
    assert not any(found.values()), {pair: keys for pair, keys in found.items() if keys}
    sizes = [
        [f.stat().st_size for f in sorted(written[n].glob("*.distcp"))] for n in ("dp2", "dp4 shared") if n in names
    ]
    for files in sizes:  # nobody writes for the others
        assert max(files) < 1.3 * min(files)


def test_experts_of_every_layout_read_those_of_every_layout(expert_toy, tmp_path):
    found, _ = relay(expert_toy, "", EXPERT_LAYOUTS, tmp_path)
    assert not any(found.values()), {pair: keys for pair, keys in found.items() if keys}


def load_with_megatron(toy, options, directory):
    """Keys of the model's tensors that megatron-core's own reader finds other than the truth."""
    from megatron.core import dist_checkpointing

    from mindspeed_llm.checkpoint.boxes import sharded_leaves, tensor_boxes
    from mindspeed_llm.checkpoint.training_state import sharded_model_state

    chunks = build(toy, options)[0]
    for parameter in chunks[0].parameters():
        parameter.data.fill_(7)
    state = sharded_model_state(chunks)
    boxes = [box for _, sharded in sharded_leaves(state) for box in tensor_boxes(sharded)]
    loaded = dist_checkpointing.load(state, directory, validate_access_integrity=False)
    chunks[0].load_state_dict(loaded["model0"], strict=False)
    return sorted({box.key for box in boxes if not torch.equal(box.tensor, truth(box))})


def test_megatron_core_reads_what_is_written(toy, expert_toy, tmp_path):
    pool(2).run(save, toy, f"--bf16 {SHARED}", tmp_path / "dense")
    pool(2).run(save, expert_toy, f"--bf16 {SHARED} {EP2}", tmp_path / "experts")
    for model, name in ((toy, "dense"), (expert_toy, "experts")):
        directory = str(tmp_path / name / "iter_0000001")
        assert pool(2).run(load_with_megatron, model, f"--bf16 {TP2} --sequence-parallel", directory) == [[], []]


def save_as_before(toy, root):
    """The truth as this library's first versions wrote it: by megatron-core, numpy's random state as an array."""
    import random
    from dataclasses import replace

    import numpy as np
    from megatron.core import dist_checkpointing, tensor_parallel
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    from mindspeed_llm.checkpoint.boxes import sharded_leaves
    from mindspeed_llm.checkpoint.optimizer_state import own_states
    from mindspeed_llm.checkpoint.training_state import rng_key, sharded_model_state

    built = build(toy, "--bf16")
    for box in state_of(built).boxes:
        box.tensor.copy_(truth(box))
    tree = sharded_model_state(built[0])
    shards = {id(sharded.data): (name, sharded) for name, sharded in sharded_leaves(tree)}
    tree["optimizer"] = {}
    for own in own_states(built[1]):
        local, sharded = shards[id(own.parameter)]
        for name, held in own.values().items():
            more = {"dtype": torch.float32} if hasattr(sharded, "dtype") else {}
            key, data = f"optimizer.state.{name}.{sharded.key}", held.view(own.parameter.shape)
            tree["optimizer"][f"{name}.{local}"] = replace(sharded, key=key, data=data, **more)
    rng = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "tracker": dict(tensor_parallel.get_cuda_rng_tracker().get_states()),
    }
    tree["rng_state"] = ShardedObject("rng_state", rng, (1, 1, 1), (0, 0, 0))
    tree |= {"optimizer_step": 5, "grad_scaler": None}
    Path(root).mkdir()
    dist_checkpointing.save(tree, str(root))
    return rng_key(), float(np.random.rand())


def load_from_before(toy, root, key):
    """(wrong keys, numpy's next number) after loading that."""
    import numpy as np

    from mindspeed_llm.checkpoint.train_save import load_training
    from mindspeed_llm.checkpoint.training_state import restore_rng_states

    state = state_of(build(toy, "--bf16"))
    for box in state.boxes:
        box.tensor.fill_(7)
    restore_rng_states(load_training(Path(root), state)[key])
    return sorted({box.key for box in state.boxes if not torch.equal(box.tensor, truth(box))}), float(np.random.rand())


def test_checkpoints_of_the_first_versions_load(toy, tmp_path):
    [(key, drawn)] = pool(1).run(save_as_before, toy, tmp_path / "before")
    assert pool(1).run(load_from_before, toy, tmp_path / "before", key) == [([], drawn)]
    [wrong] = pool(2).run(load, toy, f"--bf16 {SHARED}", [tmp_path / "before"])[:1]
    assert wrong == [[]]


def load_wrong(toy, directory):
    """The refusal of a checkpoint by a model with other layers."""
    from mindspeed_llm.checkpoint.train_save import load_training

    built = build(toy, "--truncate-layers 2")
    with pytest.raises(UserError) as refused:
        load_training(Path(directory), state_of(built))
    return str(refused.value)


def test_weights_that_nobody_has_a_place_for_are_refused(toy, tmp_path):
    [directory] = pool(1).run(save, toy, "", tmp_path)
    [refusal] = pool(1).run(load_wrong, toy, directory)
    assert "does not fit this model: it holds decoder.layers.2." in refusal and "\n" not in refusal


class Allocations(TorchDispatchMode):
    """Bytes of all tensors made while it is on, and of what is sent through collectives."""

    def __init__(self):
        super().__init__()
        self.total, self.seen = 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                if tensor.untyped_storage().data_ptr() not in before:
                    self.total += tensor.untyped_storage().nbytes()
        return out


def gather(built):
    """What must not happen: every rank puts the whole of every moment together."""
    from mindspeed_llm.checkpoint.optimizer_state import own_states

    for own in own_states(built[1]):
        flat = torch.zeros(own.parameter.numel())
        if own.main is not None:
            flat[own.start : own.stop] = own.values()["exp_avg"].flatten()
        dist.all_reduce(flat)


def measure(toy, root, gathers):
    """(bytes of this rank's state, bytes made while saving, while loading)."""
    from mindspeed_llm.checkpoint.train_save import load_training, save_training

    torch.set_num_threads(1)
    built = build(toy, f"--bf16 {SHARED}")
    held = sum(box.nbytes for box in state_of(built).boxes)
    with Allocations() as saving:
        if gathers:
            gather(built)
        save_training(order(root), state_of(built))
    with Allocations() as loading:
        load_training(Path(root) / "iter_0000001", state_of(built))
    return held, saving.total, loading.total


def test_no_rank_holds_more_than_its_share(toy, tmp_path):
    for held, saving, loading in pool(2).run(measure, toy, tmp_path / "a", False):
        # random states, and the like; what is read goes where it belongs
        assert saving < 0.05 * held and loading < 0.05 * held
    for held, saving, _ in pool(2).run(measure, toy, tmp_path / "b", True):
        assert saving > 0.2 * held


def save_beside(toy, root, isolated):
    """Save twice in the background while the state changes, and once for comparison before each change."""
    from mindspeed_llm.checkpoint import async_save, train_save

    torch.set_num_threads(1)
    built = build(toy, f"--bf16 {SHARED}")
    background, changed, original = async_save.AsyncSave(), threading.Event(), train_save.write_part

    def late(*arguments):
        changed.wait(60)
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        if not isolated:
            patch.setattr(async_save.StagingBuffer, "copy", lambda self, boxes: boxes)
        for iteration in (1, 2):
            state = state_of(built)
            patch.setattr(train_save, "write_part", original)
            train_save.save_training(order(Path(root) / "plain", iteration), state)
            patch.setattr(train_save, "write_part", late)
            changed.clear()
            background.start(order(Path(root) / "beside", iteration), state)
            busy = background.is_busy()
            for box in state.boxes:
                box.tensor.add_(1)
            changed.set()
            background.wait()
    dist.barrier()
    return busy, background._buffer.nbytes, sum(box.nbytes + 64 for box in state_of(built).own_boxes())


def files(root):
    """Content of the files of data and index."""
    return {
        f"{path.parent.name}/{path.name}": path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.suffix in (".distcp", ".pt", "") and path.name != "tracker"
    }


def test_saving_beside_training_writes_the_same_bytes(toy, tmp_path):
    for busy, buffer, own in pool(2).run(save_beside, toy, tmp_path / "a", True):
        assert busy and 0 < buffer <= own
    plain, beside = (files(tmp_path / "a" / name) for name in ("plain", "beside"))
    assert len(plain) == 2 * 4 and plain == beside
    assert plain["iter_0000001/__0_0.distcp"] != plain["iter_0000002/__0_0.distcp"]
    # without the copy the change gets into the checkpoint
    pool(2).run(save_beside, toy, tmp_path / "b", False)
    assert files(tmp_path / "b" / "plain") != files(tmp_path / "b" / "beside")


def save_elsewhere(root):
    """The refusals of a save whose ranks do not see the same directory."""
    from mindspeed_llm.checkpoint import train_save

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_save, "SHARED_SECONDS", 0.2)
        try:
            train_save.begin_save(order(Path(root) / str(dist.get_rank())))
        except UserError as refused:
            return str(refused)
    return ""


def test_a_directory_that_hosts_do_not_share_is_refused(tmp_path):
    first, second = pool(2).run(save_elsewhere, tmp_path)
    assert first == "" and "legal: a --save that all hosts share" in second and "\n" not in second


def fail_beside(toy, root, rank):
    """What the ranks hear of a background save for which one of them has no room."""
    from mindspeed_llm.checkpoint import async_save, train_save

    background, state = async_save.AsyncSave(), state_of(build(toy, ""))
    background.start(order(root, 1), state)
    background.wait()
    original = train_save.write_part

    def full(directory, number, *arguments):
        if number == rank:
            raise OSError(28, "No space left on device", str(directory / "file"))
        return original(directory, number, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_save, "write_part", full)
        background.start(order(root, 2), state)
        heard = ""
        try:
            background.wait()
        except UserError as failed:
            heard = str(failed)
    background.check()  # said once
    dist.barrier()
    return heard


@pytest.mark.parametrize("rank", [0, 1])
def test_a_failure_beside_training_is_heard_and_the_checkpoint_before_stays(toy, tmp_path, rank):
    from mindspeed_llm.checkpoint.directory import find_newest

    heard = pool(2).run(fail_beside, toy, tmp_path, rank)
    assert "iter_0000002" in heard[rank] and "No space left on device" in heard[rank] and "\n" not in heard[rank]
    if rank != 0:
        assert "because rank 1 failed: No space left on device" in heard[0]
    assert find_newest(tmp_path).name == "iter_0000001"
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []
