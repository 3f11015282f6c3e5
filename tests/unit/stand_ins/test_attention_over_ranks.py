"""Transformer Engine's attention over ranks, of what no ring computes: dropped weights, and keys ahead."""

import contextlib

import pytest
import torch

from mindspeed_llm import accelerator
from mindspeed_llm.accelerator import torch_facade
from mindspeed_llm.errors import UserError
from mindspeed_llm.models.stand_ins import transformer_engine as te
from mindspeed_llm.parallel.context_split import SequenceSplit
from mindspeed_llm.testing.pool import pool

TOTAL, BATCH, HEADS, GROUPS, SIZE = 16, 2, 4, 2, 8
# So improbable that no weight is dropped, and the same path is taken.
HARDLY = 1e-12


@contextlib.contextmanager
def megatron_on_this_device():
    """For megatron's collectives; the pool's processes serve other tests as well."""
    before = torch_facade.installed()
    torch_facade.install(accelerator.current())
    try:
        yield
    finally:
        if before is None:
            torch_facade.uninstall()


def problem():
    generator = torch.Generator().manual_seed(3)
    make = lambda heads: torch.randn(TOTAL, BATCH, heads, SIZE, generator=generator, dtype=torch.float64)  # noqa: E731
    return make(HEADS), make(GROUPS), make(GROUPS), make(HEADS).flatten(2)


def outcome(inputs, weights, group, mask_type, dropout, window, mask=None):
    """Output, and gradients of query, key and value."""
    module = te.pytorch.DotProductAttention(
        HEADS, SIZE, GROUPS, dropout, attn_mask_type=mask_type, window_size=window, cp_group=group
    )
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = module(*inputs, mask)
    (out * weights).sum().backward()
    return [out.detach(), *(x.grad for x in inputs)]


def padding():
    hidden = torch.zeros(BATCH, 1, 1, TOTAL, dtype=torch.bool)
    hidden[1, ..., 11:] = True
    return hidden


def worst(mask_type, dropout, window, balanced=True):
    """The largest difference between ranks together and one rank, whose own weights are never dropped."""
    with megatron_on_this_device():
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        *inputs, weights = problem()
        mask = padding() if mask_type == "padding" else None
        whole = outcome(inputs, weights, None, mask_type, 0.0, window, mask)
        rows = [row for start, stop in SequenceSplit(size).ranges(rank, TOTAL) for row in range(start, stop)]
        if not balanced:
            rows = list(range(rank * TOTAL // size, (rank + 1) * TOTAL // size))
        held, group = [x[rows] for x in inputs], torch.distributed.group.WORLD
        shared = outcome(held, weights[rows], group, mask_type, dropout, window, mask)
        return max((left - right[rows]).abs().max().item() for left, right in zip(shared, whole))


CASES = [("causal", HARDLY, None), ("causal", HARDLY, (3, 0)), ("no_mask", 0.0, (2, 1)), ("padding", HARDLY, None)]


@pytest.mark.parametrize("mask_type, dropout, window", CASES)
def test_ranks_together_compute_what_one_does(mask_type, dropout, window):
    assert max(pool(2).run(worst, mask_type, dropout, window)) < 1e-11


def test_the_comparison_notices_another_share_and_weights_that_are_dropped():
    assert min(pool(2).run(worst, "causal", HARDLY, None, False)) > 1e-3
    assert min(pool(2).run(worst, "causal", 0.5, None)) > 1e-3


def mean_of_dropped():
    """The mean of an attention over ones, whose weights sum to one without dropout."""
    with megatron_on_this_device():
        torch.manual_seed(5)
        module = te.pytorch.DotProductAttention(
            8, 4, 8, 0.25, attn_mask_type="no_mask", cp_group=torch.distributed.group.WORLD
        )
        out = module(torch.zeros(64, 4, 8, 4), torch.zeros(64, 4, 8, 4), torch.ones(64, 4, 8, 4))
        out_of_evaluation = module.eval()(torch.zeros(4, 1, 8, 4), torch.zeros(4, 1, 8, 4), torch.ones(4, 1, 8, 4))
        return out.mean().item(), out.std().item(), (out_of_evaluation - 1).abs().max().item()


def test_what_is_left_of_the_weights_is_scaled_up():
    for mean, deviation, of_evaluation in pool(2).run(mean_of_dropped):
        assert abs(mean - 1) < 0.01 and 0.02 < deviation < 0.2 and of_evaluation < 1e-6


def biased():
    group = torch.distributed.group.WORLD
    module = te.pytorch.DotProductAttention(HEADS, SIZE, GROUPS, cp_group=group)
    bias = {"core_attention_bias_type": "post_scale_bias", "core_attention_bias": torch.zeros(1)}
    try:
        module(*problem()[:3], **bias)
    except UserError as error:
        return str(error)


def test_a_bias_over_ranks_is_refused():
    assert all("attention bias" in refusal for refusal in pool(2).run(biased))
