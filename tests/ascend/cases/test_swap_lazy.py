"""Activation swap on streams that run as late as they may, in torch_npu's own allocator.

This file runs with ASCEND_SIMULATOR_LAZY=1.
"""

from unittest import mock

import pytest
import torch

from mindspeed_llm import accelerator
from mindspeed_llm.memory.allowance import UpToHostBytes, WhatHides
from mindspeed_llm.memory.pinned_store import PinnedStore, _PinnedCopy
from mindspeed_llm.memory.regions import MODULES, install
from mindspeed_llm.memory.store import open_store
from mindspeed_llm.memory.swap import ActivationSwap
from mindspeed_llm.models.shape import ModelShape

SHAPE = ModelShape("llama", 8, 64, 160, 4, 2, 16, 509, 256)
TOKENS, STEPS = 256, 3
ALL = 10**9
FULL = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)


def train(swaps=None, budget=ALL, **recompute):
    """Losses and gradients of some steps, and the highest memory beyond weights and gradients."""
    from mindspeed_llm.models.build import BuildOptions, build_model
    from mindspeed_llm.parallel.setup import initialize_distributed

    initialize_distributed()
    device = accelerator.current()
    model = build_model(SHAPE, BuildOptions(padded_vocab_size=512, loss_chunk_size=64, **recompute))
    swap = None
    if swaps is not None:
        store = open_store()
        allowance = UpToHostBytes(store, budget) if budget else WhatHides(store)
        swap = ActivationSwap(store, allowance, model.parameters, small=4096)
        install(swap, [model], swaps, layer_inputs=bool(recompute))
    found, peaks = [], []
    for step in range(STEPS):
        ids = torch.randint(0, 509, (1, TOKENS), generator=torch.Generator().manual_seed(step)).npu()
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        torch.npu.synchronize()
        device.reset_peak_memory()
        before = device.memory_allocated()
        loss = model(ids, labels=ids)
        loss.backward()
        torch.npu.synchronize()
        peaks.append(device.peak_memory_allocated() - before)
        found += [loss.detach().cpu(), *(p.grad.cpu() for p in model.parameters())]
    return found, max(peaks), swap


@pytest.fixture(scope="module")
def plain():
    return train()


def same(found, expected):
    return all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("budget", [ALL, None], ids=["all", "what hides"])
def test_a_run_that_swaps_is_the_same_in_less_memory(plain, budget):
    found, peak, swap = train(MODULES, budget)
    assert isinstance(swap.store, PinnedStore)
    assert same(found, plain[0])
    assert swap.swapped_bytes > 0 and swap.store.held == 0 and swap.late == 0
    if budget:
        assert peak < 0.6 * plain[1], (peak, plain[1])


def test_inputs_of_recomputed_layers_too():
    expected, before, _ = train(**FULL)
    found, peak, swap = train((), **FULL)
    assert same(found, expected) and swap.swapped_bytes > 0
    assert peak < before, (peak, before)


@pytest.mark.parametrize("owner, wait", [(PinnedStore, "await_arrival"), (_PinnedCopy, "wait_sent")])
def test_whoever_does_not_wait_is_noticed(plain, owner, wait):
    """What comes back is read before it is there, or memory is used again before it was copied out."""
    with mock.patch.object(owner, wait, lambda *arguments: None):
        found = train(MODULES)[0]
    assert not same(found, plain[0])
