"""Freezing, length, log line, schedule arithmetic and FLOPs, each by itself."""

import os
import re

import pytest

from mindspeed_llm.config.training import OptimizerConfig, TrainingConfig
from mindspeed_llm.errors import UserError
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.training.flops import training_flops
from mindspeed_llm.training.length import train_iterations
from mindspeed_llm.training.log_line import IterationLog, format_log_line
from mindspeed_llm.training.optimizer import warmup_iterations
from mindspeed_llm.training.setup import default_threads


def test_length_of_a_run():
    assert train_iterations(TrainingConfig(train_iters=7), 8, 100) == 7
    assert train_iterations(TrainingConfig(train_epochs=2), 8, 100) == 25
    assert train_iterations(TrainingConfig(train_epochs=0.5), 8, 100) == 7
    assert train_iterations(TrainingConfig(train_epochs=0.07), 7, 100) == 1
    assert train_iterations(TrainingConfig(train_samples=33), 8, 100) == 4
    assert train_iterations(TrainingConfig(), 8, 100) == 13


def test_warm_up():
    assert warmup_iterations(OptimizerConfig(lr_warmup_fraction=0.01), 500) == 5
    assert warmup_iterations(OptimizerConfig(lr_warmup_fraction=0.29), 100) == 29
    assert warmup_iterations(OptimizerConfig(lr_warmup_iters=4), 500) == 4
    with pytest.raises(UserError, match="do not fit into 5 decay iterations; legal: at most 4"):
        warmup_iterations(OptimizerConfig(lr_warmup_iters=5), 5)


LOG = IterationLog(
    iteration=5,
    train_iters=100,
    consumed_samples=40,
    elapsed=0.8123,
    tokens=1002.7,
    samples=8,
    learning_rate=1e-4,
    global_batch_size=8,
    loss=2.345678,
    loss_scale=1.0,
    grad_norm=0.912,
    skipped_iterations=0,
    flops=0.9e12 * 0.8123,
    devices=1,
    peak_flops=None,
    log_throughput=True,
)


def test_threads_are_the_users_or_a_share_of_the_cores():
    cores = len(os.sched_getaffinity(0))
    assert default_threads({}) == cores
    assert default_threads({"OMP_NUM_THREADS": "1"}) == 1
    assert default_threads({"OMP_NUM_THREADS": "3", "LOCAL_WORLD_SIZE": "2"}) == 3
    # torchrun's own value is no one's wish
    assert default_threads({"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2"}) == max(cores // 2, 1)
    assert default_threads({"OMP_NUM_THREADS": "", "LOCAL_WORLD_SIZE": str(4 * cores)}) == 1


def test_the_log_line_is_megatrons():
    line = format_log_line(LOG, now=0)
    assert re.match(
        r" \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] iteration        5/     100 \| consumed samples:           40 ", line
    )
    for part in (
        "elapsed time per iteration (ms): 812.3 | throughput per GPU (TFLOP/s/GPU): 0.9 | tokens per second: 1234.4 | ",
        "learning rate: 1.000000E-04 | global batch size:     8 | lm loss: 2.345678E+00 | loss scale: 1.0 | ",
        "grad norm: 0.912 | number of skipped iterations:   0 | number of nan iterations:   0 |",
    ):
        assert part in line
    assert "MFU" not in line


def test_flops_against_the_count_by_hand():
    shape = ModelShape("llama", 2, 8, 16, 2, 1, 4, 32, 64)
    # per token: qkv 8 x 16, proj 8 x 8, fc1 8 x 32, fc2 16 x 8, two layers; head 32 x 8
    matmul = 2 * (8 * 16 + 8 * 8 + 8 * 32 + 16 * 8)
    full = training_flops(shape, tokens=10, attention_pairs=55, output_tokens=4, frozen_base=False)
    assert full == 6 * (matmul * 10 + 32 * 8 * 4) + 12 * 2 * 8 * 55
    frozen = training_flops(shape, tokens=10, attention_pairs=55, output_tokens=4, frozen_base=True)
    assert frozen == 4 * (matmul * 10 + 32 * 8 * 4) + 12 * 2 * 8 * 55


def test_pairs_of_attention_are_counted_without_padding():
    from mindspeed_llm.data.collate import collate_concatenated, collate_padded
    from mindspeed_llm.training.step import attention_pairs

    samples = [{"input_ids": list(range(n)), "labels": [-100] * n} for n in (3, 5)]
    for batch in (
        collate_padded(samples, 0, pad_to_multiple_of=8),
        collate_concatenated(samples, 0, pad_to_multiple_of=16),
        collate_concatenated(samples, 0),
    ):
        assert attention_pairs(batch) == 6 + 15
