"""Swapped optimizer state on streams that run as late as they may, in torch_npu's own allocator.

This file runs with ASCEND_SIMULATOR_LAZY=1.
"""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from mindspeed_llm import accelerator
from mindspeed_llm.checkpoint.optimizer_state import OwnState
from mindspeed_llm.memory.optimizer_windows import StateForm, WindowedAdamW
from mindspeed_llm.memory.pinned_store import PinnedStore, _PinnedKept
from mindspeed_llm.memory.store import open_store

SHAPES, STEPS, WINDOWS = ((256, 512),) * 12 + ((777,), (3, 5)), 3, 8
NUMBERS = sum(torch.Size(shape).numel() for shape in SHAPES)


def train(form, dtype=torch.bfloat16):
    """Weights and state after some steps; bytes on the device between two steps, and the most in one, of it alone."""
    device, generator = accelerator.current(), torch.Generator().manual_seed(0)

    def draw(shape):
        return torch.randn(shape, generator=generator).npu()

    model = [torch.nn.Parameter(draw(shape).to(dtype)) for shape in SHAPES]
    gradients = [torch.empty(shape, device="npu") for shape in SHAPES]
    torch.npu.synchronize()
    before = device.memory_allocated()
    mains = [p.detach().clone().float() for p in model] if dtype != torch.float32 else model
    part = SimpleNamespace(optimizer=torch.optim.AdamW(mains, lr=0.02, fused=True))
    states = [OwnState(p, main, 0, p.numel(), False, part) for p, main in zip(model, mains)]
    WindowedAdamW.rearrange(part, states, form)
    peaks = []
    for _ in range(STEPS):
        for main, gradient in zip(mains, gradients):
            gradient.copy_(draw(main.shape))
            main.grad = gradient
        torch.npu.synchronize()
        device.reset_peak_memory()
        part.optimizer.step()
        torch.npu.current_stream().synchronize()  # what nobody waits for runs after it
        if not form.moves_masters and dtype != torch.float32:
            torch._foreach_copy_([p.data for p in model], mains)
        torch.npu.synchronize()
        peaks.append(device.peak_memory_allocated() - before)
    left = device.memory_allocated() - before
    found = [p.detach().cpu() for p in model]
    for own in states:
        found += [values.cpu() for values in own.values().values()]
    return found, left, max(peaks)


def same(found, expected):
    return all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def swapped(**form):
    store = open_store()
    assert isinstance(store, PinnedStore)
    return StateForm(store=store, windows=WINDOWS, **form)


@pytest.fixture(scope="module")
def plain():
    return train(StateForm())


@pytest.mark.parametrize("form", [{}, {"split": True}], ids=["swap", "swap and reuse"])
def test_a_step_in_windows_is_the_same_in_less_memory(plain, form):
    expected, resident, _ = plain
    found, left, peak = train(swapped(**form))
    assert same(found, expected)
    assert resident > 12 * NUMBERS and left < 0.01 * resident
    if not form:  # two windows, and blocks are rounded up
        assert peak < 1.2 * 2 * 12 * NUMBERS / WINDOWS, (peak, resident)


def test_bf16_moments_and_fp32_weights_too():
    for form, dtype in (({"moments": torch.bfloat16}, torch.bfloat16), ({}, torch.float32)):
        assert same(train(swapped(**form), dtype)[0], train(StateForm(**form), dtype)[0])


def test_split_weights_are_whole_again(plain):
    expected, resident, _ = plain
    found, left, _ = train(StateForm(split=True))
    assert same(found, expected)
    assert 1.8 * NUMBERS < resident - left < 1.9 * NUMBERS


def sent_at_once(self, start):
    """The memory is given up before the copy out has been waited for."""
    self._last, _ = self._going.pop(start)


def test_whoever_does_not_wait_is_noticed(plain):
    with mock.patch.object(_PinnedKept, "wait_sent", sent_at_once):
        assert not same(train(swapped())[0], plain[0])
