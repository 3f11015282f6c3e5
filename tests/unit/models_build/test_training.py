"""The model trains with megatron's data-parallel wrapper and optimizers on this device, in every precision."""

import subprocess
import sys

import pytest
import torch

from mindspeed_llm.models.build import BuildOptions, build_model
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.parallel.setup import initialize_distributed

torch.set_num_threads(1)

LLAMA = ModelShape("llama", 4, 48, 80, 6, 2, 12, 131, 256, init_method_std=0.1)


def train(dtype, distributed_optimizer, steps=8):
    """Losses per token of a model learning one batch by heart, and whether each step was taken."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.module import Float16Module

    model = build_model(LLAMA, BuildOptions(params_dtype=dtype))
    wrapped = model if dtype == torch.float32 else Float16Module(model.config, model)
    wrapped = DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(use_distributed_optimizer=distributed_optimizer, grad_reduce_in_fp32=True),
        wrapped,
    )
    config = OptimizerConfig(
        optimizer="adam",
        lr=3e-3,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        params_dtype=dtype,
        use_distributed_optimizer=distributed_optimizer,
        clip_grad=1.0,
        initial_loss_scale=2.0**12,
    )
    optimizer = get_megatron_optimizer(config, [wrapped])
    ids = torch.randint(0, 131, (2, 13), generator=torch.Generator().manual_seed(1))
    labels = ids[:, 1:].clone()
    labels[1, 5:] = -100
    losses, taken = [], []
    for _ in range(steps):
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        loss = wrapped(ids[:, :-1].contiguous(), labels=labels)
        optimizer.scale_loss(loss).backward()
        finalize_model_grads([wrapped], torch.tensor(17, dtype=torch.int))
        success, norm, _ = optimizer.step()
        taken.append(success and norm > 0)
        losses.append(float(loss.detach()) / 17)
    return losses, taken


@pytest.fixture(scope="module")
def fp32():
    initialize_distributed()
    return train(torch.float32, False)[0]


@pytest.mark.parametrize("distributed_optimizer", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_precision_and_optimizer_learns_alike(fp32, dtype, distributed_optimizer):
    losses, taken = train(dtype, distributed_optimizer)
    assert all(taken)
    assert losses[-1] < 0.6 * losses[0]
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert losses == pytest.approx(fp32, rel=tolerance)


@pytest.mark.slow
def test_megatron_loaded_before_us_works_the_same(fp32):
    """The facade and patches reach modules that are loaded already."""
    program = f"""
import sys, warnings; warnings.simplefilter("ignore")
import torch; torch.set_num_threads(1)
import megatron.core.optimizer, megatron.core.distributed, megatron.core.models.gpt
sys.path.insert(0, {str(__file__.rsplit("/", 1)[0])!r})
import test_training
test_training.initialize_distributed()
print(test_training.train(torch.bfloat16, True, steps=2)[0])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert eval(done.stdout) == pytest.approx(train(torch.bfloat16, True, steps=2)[0], rel=1e-6)
