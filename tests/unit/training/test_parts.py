"""Freezing, length, log line, schedule arithmetic and FLOPs, each by itself."""

import os
import re
import types

import pytest

from mindspeed_llm.config.training import OptimizerConfig, TrainingConfig
from mindspeed_llm.errors import UserError
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.training.flops import training_flops
from mindspeed_llm.training.length import train_iterations
from mindspeed_llm.training.log_line import IterationLog, format_log_line
from mindspeed_llm.training.optimizer import build_scheduler, warmup_samples
from mindspeed_llm.training.setup import default_threads


def test_length_of_a_run():
    assert train_iterations(TrainingConfig(train_iters=7), 8, 100) == 7
    assert train_iterations(TrainingConfig(train_epochs=2), 8, 100) == 25
    assert train_iterations(TrainingConfig(train_epochs=0.5), 8, 100) == 7
    assert train_iterations(TrainingConfig(train_epochs=0.07), 7, 100) == 1
    assert train_iterations(TrainingConfig(train_samples=33), 8, 100) == 4
    assert train_iterations(TrainingConfig(), 8, 100) == 13


def test_warm_up():
    assert warmup_samples(OptimizerConfig(lr_warmup_fraction=0.01), 500, 8) == 5
    assert warmup_samples(OptimizerConfig(lr_warmup_fraction=0.25), 50, 8) == 12.5
    assert warmup_samples(OptimizerConfig(lr_warmup_iters=4), 4000, 8) == 32
    with pytest.raises(UserError, match="5 warm-up iterations do not fit into 5 decay iterations; legal: at most 4"):
        warmup_samples(OptimizerConfig(lr_warmup_iters=5), 40, 8)
    with pytest.raises(UserError, match="--lr-warmup-fraction: 1.0 is wrong"):
        warmup_samples(OptimizerConfig(lr_warmup_fraction=1.0), 40, 8)


def rates(scheduler, optimizer, iterations, batch=8):
    found = []
    for _ in range(iterations):
        found.append(optimizer.param_groups[0]["lr"])
        scheduler.step(batch)
    return found


def megatron_rates(options, decay, warmup, wsd=None, iterations=24):
    """Of megatron-core's schedule with the numbers that Megatron-LM's training.py gives it."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    optimizer = types.SimpleNamespace(param_groups=[{}])
    scheduler = OptimizerParamScheduler(
        optimizer, options.lr_warmup_init, 1e-3, options.min_lr, warmup, decay, options.lr_decay_style,
        0.1, 0.1, 192, "constant", wsd_decay_steps=wsd, lr_wsd_decay_style=options.lr_wsd_decay_style,
    )  # fmt: skip
    return rates(scheduler, optimizer, iterations)


@pytest.mark.parametrize(
    "options, train_samples, decay, warmup, wsd",
    [
        ({"lr_warmup_fraction": 0.03}, 192, 192, 0.03 * 192, None),  # ends inside the first iteration
        ({"lr_warmup_fraction": 0.29, "lr_decay_iters": 20, "lr_warmup_init": 1e-5}, 192, 160, 0.29 * 160, None),
        ({"lr_warmup_fraction": 0.1, "lr_decay_style": "inverse-square-root"}, 192, 192, 0.1 * 192, None),
        ({"lr_warmup_fraction": 0.1, "lr_decay_style": "WSD", "lr_wsd_decay_iters": 5}, 192, 192, 0.1 * 192, 40),
        ({"lr_warmup_iters": 3, "lr_decay_style": "linear"}, 192, 192, 24, None),
        ({"lr_warmup_fraction": 0.1}, 198, 198, 0.1 * 198, None),  # --train-samples, of which a rest is left over
    ],
)
def test_rates_are_those_of_megatron_lm(options, train_samples, decay, warmup, wsd):
    config = OptimizerConfig(min_lr=1e-4, weight_decay=0.1, **options)
    optimizer = types.SimpleNamespace(param_groups=[{}])
    scheduler = build_scheduler(config, optimizer, learning_rate=1e-3, train_samples=train_samples, global_batch_size=8)
    found = rates(scheduler, optimizer, 24)
    assert found == megatron_rates(config, decay, warmup, wsd)
    if warmup % 8:  # cut to whole iterations it is another schedule
        assert found != megatron_rates(config, decay, warmup // 8 * 8, wsd)


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
