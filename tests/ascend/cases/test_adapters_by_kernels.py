"""Adapters beside products that send by themselves (--use-ascend-mc2): two processes over hccl train what a CPU does.

The base goes through npu_all_gather_base_mm and npu_mm_reduce_scatter_base, forward and backward, and the adapter's
narrow tensors travel beside them (lora/fusion/products.py).
"""

import functools
from contextlib import ExitStack
from unittest import mock

import pytest
from cases.jobs import calls, join_on_npu

from mindspeed_llm.checkpoint.toy import make_toy
from mindspeed_llm.testing.layouts import assert_same, compare, make_rows, train
from mindspeed_llm.testing.pool import pool

GATHER, SCATTER = "npu_all_gather_base_mm", "npu_mm_reduce_scatter_base"
STEPS = 3
# Of two column and two row linears in each of two layers, for two micro-batches a step: the column linears gather
# forward, the row linears backward, and the other way round they scatter. The first qkv's input needs no gradient.
CALLS = {GATHER: STEPS * 2 * (4 + 4), SCATTER: STEPS * 2 * (4 + 3)}
# Full recomputation makes every forward pass twice, and from an input that needs a gradient.
CALLS_RECOMPUTED = {GATHER: STEPS * 2 * (4 + 4 + 4), SCATTER: STEPS * 2 * (4 + 4 + 4)}
# Inner sizes of 256 and more, on each of two ranks, for the kernels; rows and their halves are whole blocks of NF4.
WIDE = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 2, "head_dim": 128}
# The kernels take no fp32; fp16 rounds eight times finer than bf16.
FLAGS = (
    "--fp16 --loss-scale 1 --tensor-model-parallel-size 2 --sequence-parallel --no-padding-free --micro-batch-size 2 "
    "--lora-r 8 --lora-alpha 16 --lora-target-modules all-linear"
)
RECOMPUTED = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
# what runs on the device -> what the CPU is compared by
VARIANTS = {
    "": "",
    "--lora-dropout 0.25": "--lora-dropout 0.25",
    "--qlora": "--qlora",
    "--use-dora": "--use-dora",
    "--no-lora-fusion": "",
    "--lora-fusion-combine": "--lora-fusion-combine",
    RECOMPUTED: "",
}
# Between devices gradients of q and k differ by 0.014 to 0.02; a sum that is left out makes 0.8.
LOSS, GRADIENT, WRONG = 1e-3, 5e-2, 0.4


def every_fourth_dropped(module, x):
    """x without every fourth input of the whole linear: masks that are the same on every device."""
    if module.dropout == 0.0 or not module.training:
        return None
    start = 0 if module.kind.column else module.kind.group.rank() * x.shape[-1]
    kept = x.new_ones(x.shape[-1])
    kept[(3 - start) % 4 :: 4] = 0
    return x * kept / (1 - module.dropout)


def nothing_arrives(message):
    """A mistake: the other ranks' sums for the adapter never come."""
    message.work.wait()
    return [part.zero_() for part in message._views(message.received[0])]


def tune(model, flags, mistake=False):
    """Losses and gradients of three steps, and how often each of torch_npu's kernels ran."""
    counted = calls()
    counted.clear()
    with ExitStack() as patches:
        patches.enter_context(mock.patch("mindspeed_llm.lora.layers.LoraMixin.dropped_input", every_fourth_dropped))
        if mistake:
            patches.enter_context(mock.patch("mindspeed_llm.lora.fusion.products._Scattering.wait", nothing_arrives))
        trained = train(model, flags, make_rows(4, longest=48), steps=STEPS, learning_rate=1e-2)
    return trained, dict(counted)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_toy("llama", tmp_path_factory.mktemp("wide") / "llama", **WIDE))


@pytest.fixture(scope="module")
def on_cpu(model):
    """flags -> what two processes train on the CPU."""

    @functools.cache
    def run(flags):
        trained, kernels = pool(2).run(tune, model, f"{FLAGS} {flags}", timeout=400)[0]
        assert not kernels
        return trained

    return run


def on_device(model, flags, mistake=False):
    return pool(2, join_on_npu).run(tune, model, f"{FLAGS} {flags}", mistake, timeout=400)[0]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda flags: flags.replace(RECOMPUTED, "recomputed") or "plain")
def test_adapters_train_beside_the_kernels_as_on_a_cpu(model, on_cpu, variant):
    found, ran = on_device(model, f"{variant} --use-ascend-mc2")
    expected = CALLS_RECOMPUTED if variant == RECOMPUTED else CALLS
    assert {kernel: ran.get(kernel) for kernel in expected} == expected
    assert_same(found, on_cpu(VARIANTS[variant]), LOSS, GRADIENT)
    silent = [name for name, gradient in found.gradients[-1].items() if not gradient.any()]
    assert found.gradients[-1] and not silent, silent


def test_the_kernels_give_what_their_parts_do(model):
    """On one device both are the same sums of the same products."""
    by_kernel, in_parts = (on_device(model, flags) for flags in ("--use-ascend-mc2", ""))
    assert not {GATHER, SCATTER} & in_parts[1].keys()
    assert_same(by_kernel[0], in_parts[0], 1e-4, 1e-3)


def test_a_sum_that_never_comes_is_noticed(model, on_cpu):
    found, _ = on_device(model, "--use-ascend-mc2", mistake=True)
    assert compare(found, on_cpu("")).gradient > WRONG
