"""Parameters, gradients and optimizer state cut over the data-parallel ranks train as one process does."""

import gc
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from mindspeed_llm.checkpoint.toy import make_toy
from mindspeed_llm.testing.layouts import assert_same, compare, make_rows, train
from mindspeed_llm.testing.pool import pool

FSDP2 = "--use-torch-fsdp2"
KEEP = f"{FSDP2} --torch-fsdp2-no-reshard-after-forward"
JOINED = "--micro-batch-size 2"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
MODELS = {
    "dense": ("llama", {}),
    "tied": ("qwen2", {"tie_word_embeddings": True}),
    "experts": ("qwen3_moe", EXPERTS),
    "predicting": ("deepseek_v3", {"num_nextn_predict_layers": 1}),
}
ROWS, EQUAL = make_rows(8), make_rows(8, equal=True)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """toy(kind): a directory with a random model of that kind, made once."""
    made = {}

    def directory(kind):
        if kind not in made:
            family, changes = MODELS[kind]
            made[kind] = str(make_toy(family, tmp_path_factory.mktemp("toys") / kind, **changes))
        return made[kind]

    return directory


@pytest.fixture(scope="module")
def alone(toy):
    """One process without FSDP2, once for each set of arguments."""
    found = {}

    def run(kind="dense", flags=JOINED, rows=ROWS, steps=3, optimizer="sgd", rate=0.1, door="posttrain"):
        key = (kind, flags, id(rows), steps, optimizer, door)
        if key not in found:
            found[key] = pool(1).run(train, toy(kind), flags, rows, steps, optimizer, rate, door)[0]
        return found[key]

    return run


@pytest.mark.parametrize(
    "kind, ranks, flags",
    [
        ("dense", 1, FSDP2),
        ("dense", 2, FSDP2),
        ("dense", 4, KEEP),
        ("tied", 2, FSDP2),
        ("experts", 2, f"{FSDP2} --moe-grouped-gemm"),
        ("predicting", 2, FSDP2),
        ("dense", 2, f"{FSDP2} {FULL}"),
        ("experts", 2, f"{FSDP2} --moe-zero-memory level1 --recompute-norm"),
        ("dense", 2, f"{FSDP2} --context-parallel-size 2"),
        ("experts", 4, f"{FSDP2} {TP2}"),
    ],
)
def test_a_cut_model_trains_as_one_process_does(alone, toy, kind, ranks, flags):
    assert_same(pool(ranks).run(train, toy(kind), f"{JOINED} {flags}", ROWS)[0], alone(kind))


def test_pre_training(alone, toy):
    flags = "--seq-length 24"
    found = pool(2).run(train, toy("dense"), f"{flags} {FSDP2}", EQUAL, 3, "sgd", 0.1, "pretrain")[0]
    assert_same(found, alone("dense", flags, EQUAL, door="pretrain"))


@pytest.mark.parametrize("flags", ["--bf16", "--bf16 --lora-r 4"])
def test_bf16_gradients_are_summed_in_fp32(alone, toy, flags):
    found = pool(2).run(train, toy("tied"), f"{flags} {FSDP2}", ROWS, 1)[0]
    assert_same(found, alone("tied", flags, steps=1))


@pytest.mark.parametrize("kind, flags", [
    ("dense", "--bf16"),
    ("dense", "--lora-r 4 --loraplus-lr-ratio 4"),
    ("experts", "--moe-grouped-gemm"),
], ids=str)  # fmt: skip
def test_adamw_updates_the_shards(alone, toy, kind, flags):
    """Six steps: losses, and the norms that gradients are clipped by."""
    flags = f"{flags} --lr 1e-3 --lr-decay-style constant --clip-grad 0.5"
    expected = alone(kind, flags, steps=6, optimizer="adamw", rate=1e-3)
    found = pool(2).run(train, toy(kind), f"{flags} {FSDP2}", ROWS, 6, "adamw", 1e-3)[0]
    close = 1e-4 if "--bf16" in flags else 1e-5
    assert found.losses == pytest.approx(expected.losses, rel=close)
    assert found.norms == pytest.approx(expected.norms, rel=20 * close)
    assert expected.losses[-1] < expected.losses[0]


def train_changed(target, change, *arguments):
    """`train` with something replaced."""
    with mock.patch(target, change):
        return train(*arguments)


def nothing(*arguments, **named):
    """In the place of a method."""


def test_means_over_ranks_are_noticed(alone, toy):
    target = "torch.distributed.fsdp.FSDPModule.set_gradient_divide_factor"
    found = pool(2).run(train_changed, target, nothing, toy("dense"), f"{JOINED} {FSDP2}", ROWS, 1)[0]
    assert compare(found, alone(steps=1)).gradient > 0.1


def test_a_norm_of_one_ranks_share_is_noticed(alone, toy):
    flags = "--lr 1e-3 --lr-decay-style constant --clip-grad 0.5"
    expected = alone("dense", flags, steps=2, optimizer="adamw", rate=1e-3)
    target = "megatron.core.parallel_state.get_tensor_and_data_parallel_group"
    arguments = (toy("dense"), f"{flags} {FSDP2}", ROWS, 2, "adamw", 1e-3)
    found = pool(2).run(train_changed, target, alone_in_a_group, *arguments)[0]
    assert abs(found.norms[0] / expected.norms[0] - 1) > 0.01


def alone_in_a_group(**named):
    """The group of this rank's tensor-parallel peers, of whom there are none."""
    from megatron.core import parallel_state

    return parallel_state.get_tensor_model_parallel_group()


def live_bytes():
    """Bytes of all tensors of this process."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor) and not isinstance(x, DTensor)]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors if not x.is_meta}
    return sum(storages.values())


def bytes_between_steps(*arguments):
    """Bytes of parameters, gradients and optimizer state after the last step of `train`."""
    before, found = live_bytes(), []
    with mock.patch("mindspeed_llm.testing.layouts.gather_parameters", lambda built: found.append(live_bytes())):
        train(*arguments)
    return found[0] - before


def test_each_rank_holds_its_share(toy):
    """With use_torch_fsdp2 16 bytes per parameter over the ranks: fp32 weights and no others, gradients, moments."""
    flags, whole = "--bf16", 18
    arguments = (ROWS, 2, "adamw", 1e-3)
    # The first rank also has the gradients that are compared elsewhere, so the last one is looked at.
    everything = pool(4).run(bytes_between_steps, toy("dense"), f"--lr 1e-3 {flags}", *arguments)[3]
    cut = pool(4).run(bytes_between_steps, toy("dense"), f"--lr 1e-3 {flags} {FSDP2}", *arguments)[3]
    assert cut / everything == pytest.approx(16 / whole / 4, rel=0.1)


def gathers(*arguments):
    """How many times a step gathers."""
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    real, count = getattr(dist, name), []

    def counted(*given, **named):
        count.append(1)
        return real(*given, **named)

    with mock.patch.object(dist, name, counted):
        train(*arguments)
    return len(count)


def test_layers_are_gathered_again_or_kept(toy):
    """torch_fsdp2_reshard_after_forward: of four layers, the embedding, and norm and output layer together."""
    arguments = (toy("dense"), ROWS[:2], 1)
    again, kept = (pool(2).run(gathers, arguments[0], flags, *arguments[1:])[0] for flags in (FSDP2, KEEP))
    assert (again, kept) == (11, 6)
