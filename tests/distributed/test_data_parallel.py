"""Data parallelism: shared optimizer state, overlapping communication, unequal shares of trained tokens, precision."""

from contextlib import contextmanager
from unittest import mock

import pytest
import torch

from mindspeed_llm.data.record import IGNORE_INDEX
from mindspeed_llm.ops.matmul_accumulate import matmul_accumulate
from mindspeed_llm.testing.layouts import assert_same, compare, make_rows, train
from mindspeed_llm.testing.pool import pool

SHARED = "--use-distributed-optimizer"
OVERLAPS = f"{SHARED} --overlap-grad-reduce --overlap-param-gather"
VPP2 = "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"


def without_labels(rows, replicas, rank):
    """The rows, those of one data-parallel rank without a trained token (ranks take turns)."""
    kept = [dict(row) for row in rows]
    for row in kept[rank::replicas]:
        row["labels"] = row["labels"] * 0 + IGNORE_INDEX
    return kept


ROWS = make_rows(8)
SILENT = without_labels(ROWS, 2, 1)


@contextmanager
def settings_changed(**changes):
    """megatron-core's data-parallel settings with other values than ours."""
    from megatron.core import distributed

    original = distributed.DistributedDataParallelConfig
    with mock.patch.object(distributed, "DistributedDataParallelConfig", lambda **s: original(**s | changes)):
        yield


def train_with(changes, *arguments):
    """`train` under changed data-parallel settings."""
    with settings_changed(**changes):
        return train(*arguments)


def train_without_waiting(*arguments):
    """`train` where layers wait for parameters as megatron-core makes them."""
    with mock.patch("mindspeed_llm.training.setup.wait_for_gathers", lambda wrapped: None):
        return train(*arguments)


@pytest.fixture(scope="module")
def alone(toy_qwen):
    """One process, once for each set of arguments."""
    found = {}

    def run(flags="", rows=ROWS, steps=3, optimizer="sgd", rate=0.1):
        key = (flags, id(rows), steps, optimizer)
        if key not in found:
            found[key] = pool(1).run(train, str(toy_qwen), flags, rows, steps, optimizer, rate)[0]
        return found[key]

    return run


@pytest.mark.parametrize("flags", ["", OVERLAPS])
def test_a_rank_without_a_trained_token_takes_part(alone, toy_qwen, flags):
    assert_same(pool(2).run(train, str(toy_qwen), flags, SILENT)[0], alone(rows=SILENT))


def test_a_mean_of_means_is_noticed(alone, toy_qwen):
    found = pool(2).run(train, str(toy_qwen), "", SILENT, 1, "sgd", 0.1, "posttrain", "loss mean per rank")[0]
    assert compare(found, alone(rows=SILENT, steps=1)).gradient > 0.01


def test_a_dropped_reduction_is_noticed(alone, toy_qwen):
    with pytest.raises(AssertionError):
        mutation = "no sum over data-parallel ranks"
        assert_same(pool(2).run(train, str(toy_qwen), "", ROWS, 3, "sgd", 0.1, "posttrain", mutation)[0], alone())


# Small buckets, so that many reductions and gathers are under way at once.
@pytest.mark.parametrize("adapters", ["", "--lora-r 4"])
@pytest.mark.parametrize("processes, flags", [(2, OVERLAPS), (4, f"{VPP2} {OVERLAPS}")])
def test_every_layer_waits_for_what_it_uses(alone, toy_qwen, processes, flags, adapters):
    expected = alone(f"{adapters} --lr 1e-3", optimizer="adamw", rate=1e-3)
    arguments = (str(toy_qwen), f"{adapters} --lr 1e-3 {flags}", ROWS, 3, "adamw", 1e-3)
    assert_same(pool(processes).run(train_with, {"bucket_size": 3000}, *arguments)[0], expected)


def test_waiting_for_called_modules_alone_is_noticed(toy_qwen):
    with pytest.raises(AssertionError):
        flags = f"--pipeline-model-parallel-size 2 {OVERLAPS}"
        pool(4).run(train_without_waiting, str(toy_qwen), flags, ROWS, 3, "adamw", 1e-3)


@pytest.mark.parametrize("flags", [SHARED, OVERLAPS])
def test_bf16_gradients_are_summed_in_fp32(alone, toy_qwen, flags):
    found = pool(2).run(train, str(toy_qwen), f"--bf16 {flags}", ROWS, 1)[0]
    assert_same(found, alone("--bf16", steps=1))


def test_a_sum_in_bf16_is_noticed(alone, toy_qwen):
    found = pool(2).run(train_with, {"grad_reduce_in_fp32": False}, str(toy_qwen), "--bf16", ROWS, 1)[0]
    assert compare(found, alone("--bf16", steps=1)).gradient > 1e-4


def test_bf16_weights_follow_fp32_masters(alone, toy_qwen):
    """Steps far below bf16's resolution of a weight add up in the masters."""
    flags, rate = "--bf16 --lr 3e-5 --lr-decay-style constant", 3e-5
    expected = alone(flags, steps=6, optimizer="adamw", rate=rate)
    found = pool(2).run(train, str(toy_qwen), f"{flags} {OVERLAPS}", ROWS, 6, "adamw", rate)[0]
    assert found.losses == pytest.approx(expected.losses, rel=1e-4)
    assert expected.losses[-1] < expected.losses[0]


def test_fp16_losses_are_scaled(alone):
    """What the optimizer divides by the loss scale again has been multiplied by it."""
    plain, scaled = (alone(f"--fp16 --loss-scale {scale}", steps=1).gradients[0] for scale in (1, 1024))
    norms = [torch.cat([g.flatten() for g in gradients.values()]).norm() for gradients in (plain, scaled)]
    assert float(norms[1] / norms[0]) == pytest.approx(1024, rel=1e-3)


def train_with_fused_accumulation(*arguments):
    """`train`, and the types of the sums that products were added to."""
    from mindspeed_llm.models import linear

    sums = []

    def accumulate(total, grad, x):
        sums.append(total.dtype)
        matmul_accumulate(total, grad, x)

    with mock.patch.object(linear, "matmul_accumulate", accumulate):
        return train(*arguments), sums


@pytest.mark.parametrize("overlaps", ["", OVERLAPS])
def test_gradients_accumulated_in_the_product_are_counted_once(alone, toy_qwen, overlaps):
    flags = f"--gradient-accumulation-fusion {overlaps}"
    (found, sums), _ = pool(2).run(train_with_fused_accumulation, str(toy_qwen), flags, ROWS)
    assert sums and set(sums) == {torch.float32}
    assert_same(found, alone())
