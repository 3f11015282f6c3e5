"""AdamW over state in other forms and places: the arithmetic, against torch's AdamW, bit for bit."""

import time
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from mindspeed_llm.checkpoint.optimizer_state import OwnState
from mindspeed_llm.memory import mapped_store, optimizer_masters, optimizer_windows
from mindspeed_llm.memory.mapped_store import MappedStore
from mindspeed_llm.memory.optimizer_arrays import DeviceArray, HostArray
from mindspeed_llm.memory.optimizer_halves import join, split
from mindspeed_llm.memory.optimizer_windows import StateForm, WindowedAdamW
from mindspeed_llm.ops import registry

torch.set_num_threads(1)

STEPS = 4
# A matrix of more than one chunk, one that ends between vectors, a vector, a number, and nothing.
SHAPES = ((30, 31), (7, 9), (65,), (1,), (0,))
RATES = {"lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-6}
LOWER_HALVES = (0, 1, 0x3FFF, 0x4000, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0x8002, 0xBFFF, 0xC000, 0xFFFE, 0xFFFF)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several to each window."""
    monkeypatch.setattr(optimizer_windows, "STEP_VALUES", 128)


def numbers(lower):
    """fp32 [65536] with every upper half and this lower one."""
    bits = (torch.arange(2**16) << 16) | lower
    return bits.to(torch.int64).sub(2**32 * (bits >= 2**31)).to(torch.int32).view(torch.float32)


def bits(tensor):
    return tensor.view(torch.int32)


@pytest.mark.parametrize("lower", LOWER_HALVES, ids=hex)
def test_a_number_is_put_together_again_bit_for_bit(lower):
    master = numbers(lower)
    weight, rest, above = split(master)
    assert torch.equal(weight.view(torch.int16), master.to(torch.bfloat16).view(torch.int16))
    assert (rest.dtype, above.dtype, above.numel()) == (torch.int16, torch.uint8, master.numel() // 8)
    joined, is_nan = join(weight, rest, above), master.isnan()
    assert torch.equal(bits(joined)[~is_nan], bits(master)[~is_nan])
    assert joined[is_nan].isnan().all()
    if lower == 0x8000:  # without the bit half of the ties are lost
        assert not torch.equal(bits(join(weight, rest, 0 * above))[~is_nan], bits(master)[~is_nan])


def train(form=None, dtype=torch.float32, rounded=False, steps=STEPS):
    """Weights, masters and moments after some steps of torch's own fused AdamW, or of ours.

    Args:
        form: None for torch's.
        rounded: torch's moments are rounded to bf16 after each step.
    """
    generator = torch.Generator().manual_seed(0)
    model = [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]
    mixed = dtype != torch.float32
    mains = [p.detach().clone().float() for p in model] if mixed else model
    groups = [{"params": mains[:2], "weight_decay": 0.1}, {"params": mains[2:], "weight_decay": 0.0}]
    inner = torch.optim.AdamW(groups, fused=True, **RATES)
    part = SimpleNamespace(optimizer=inner)
    states = [OwnState(p, main, 0, p.numel(), False, part) for p, main in zip(model, mains)]
    if form is not None:
        WindowedAdamW.rearrange(part, states, form)
    for step in range(steps):
        for number, main in enumerate(mains):
            drawn = torch.randn(main.shape, generator=generator)
            main.grad = None if (step, number) == (1, 2) else drawn
        inner.step()
        if rounded:
            for state in inner.state.values():
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name].copy_(state[name].bfloat16().float())
        if mixed and (form is None or not form.moves_masters):
            for weight, main in zip(model, mains):
                weight.data.copy_(main)
    found = {}
    for number, own in enumerate(states):
        held = own.values() if mains[number].numel() else {}
        found |= {f"{number} {name}": value.detach().clone().float() for name, value in held.items()}
        found[f"{number} weight"] = own.parameter.detach().clone()
        found[f"{number} step"] = inner.state[mains[number]].get("step", torch.zeros(()))
    return found, inner


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


FORMS = {
    "windows": lambda: StateForm(),
    "swapped": lambda: StateForm(store=MappedStore(), windows=5),
    "swapped in one": lambda: StateForm(store=MappedStore(), windows=1),
    "split": lambda: StateForm(split=True),
    "split and swapped": lambda: StateForm(split=True, store=MappedStore(), windows=5),
}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize(
    "name, precision", [(n, p) for n in FORMS for p in PRECISIONS if p == "bf16" or "split" not in n]
)
def test_every_bit_is_torchs(name, precision):
    dtype = PRECISIONS[precision]
    assert_equal(train(FORMS[name](), dtype)[0], train(dtype=dtype)[0])


@pytest.mark.parametrize("kept", [{}, {"split": True}, {"windows": 3}], ids=["alone", "split", "swapped"])
def test_bf16_moments_are_fp32_ones_rounded_after_each_step(kept):
    store = MappedStore() if "windows" in kept else None
    form = StateForm(moments=torch.bfloat16, store=store, **kept)
    found = train(form, torch.bfloat16)[0]
    assert_equal(found, train(dtype=torch.bfloat16, rounded=True)[0])
    assert not torch.equal(found["0 fp32_param"], train(dtype=torch.bfloat16)[0]["0 fp32_param"])


def test_a_cut_instead_of_rounding_is_noticed():
    """The negative control: bf16 by leaving the lower half away."""

    def cut(self, source):
        if self.dtype == torch.bfloat16 and source.dtype == torch.float32:
            source = (source.view(torch.int32) & -(2**16)).view(torch.float32)
        return copy(self, source)

    copy = torch.Tensor.copy_
    expected = train(dtype=torch.bfloat16, rounded=True)[0]
    with mock.patch.object(torch.Tensor, "copy_", cut):
        found = train(StateForm(moments=torch.bfloat16), torch.bfloat16)[0]
    assert not torch.equal(found["0 exp_avg"], expected["0 exp_avg"])


def test_the_plain_formula_steps_too():
    registry.select("adamw", registry.REFERENCE)
    try:
        found = [train(form and form(), torch.bfloat16)[0] for form in (FORMS["windows"], FORMS["split and swapped"])]
    finally:
        registry.reset()
    assert_equal(*found)


@pytest.mark.parametrize("broken", ["above", "rest", "none"])
def test_a_lost_half_is_noticed(broken):
    """Negative controls: masters come back as their weights, or ties from one side."""

    def forgetful(master):
        weight, rest, above = split(master)
        return weight, rest * (broken != "rest"), above * (broken != "above")

    expected = train(dtype=torch.bfloat16)[0]["0 fp32_param"]
    with mock.patch.object(optimizer_masters, "split", forgetful):
        found, inner = train(StateForm(split=True), torch.bfloat16)
        assert torch.equal(found["0 fp32_param"], expected) == (broken != "rest")
        slot = inner.elsewhere.slots[0]
        tie = torch.full(slot.main.shape, 1 + 2**-8)  # half way up, to be rounded down
        tie[0] = 1 + 2**-7 + 2**-8  # and half way, to be rounded up
        inner.elsewhere.accept(slot.main, tie)
        assert torch.equal(inner.elsewhere.master(slot.main), tie) == (broken == "none")


@contextmanager
def slowly():
    """Copies that take their time."""
    run = mapped_store._Job.run

    def wait_and_run(job):
        time.sleep(0.002)
        run(job)

    with mock.patch.object(mapped_store._Job, "run", wait_and_run):
        yield


@pytest.mark.parametrize("wait", ["wait_fetched", "wait_sent", "none"])
def test_who_does_not_wait_for_a_copy_is_noticed(wait):
    """Memory is used before it has arrived, or (as a device's allocator does) again before it was sent."""

    def unheard(self, start):
        (self._coming if wait == "wait_fetched" else self._going)[start][0].done = mock.Mock()
        job, memory = (self._coming if wait == "wait_fetched" else self._going).pop(start)
        if wait == "wait_sent":
            memory.fill_(0xFF)
        return memory

    expected = train(dtype=torch.bfloat16)[0]
    patch = mock.patch.object(mapped_store._MappedKept, wait, unheard) if wait != "none" else slowly()
    with slowly(), patch:
        found = train(FORMS["swapped"](), torch.bfloat16)[0]
    equal = all(torch.equal(found[name], value) for name, value in expected.items())
    assert equal == (wait == "none")


def test_the_device_holds_two_windows():
    held, highest = {}, []

    class Counted(HostArray):
        def fetch(self, start, stop):
            held[id(self), start] = stop - start
            highest.append(sum(held.values()))
            super().fetch(start, stop)

        def wait_sent(self, start):
            super().wait_sent(start)
            del held[id(self), start]

    with mock.patch.object(optimizer_windows, "HostArray", Counted):
        inner = train(StateForm(store=MappedStore(), windows=4), torch.bfloat16)[1]
    window = inner.elsewhere.windows[0]
    assert len(inner.elsewhere.windows) == 4 and not held
    assert max(highest) == 2 * 3 * (window.stop - window.start)  # of both moments and masters


def own_bytes(inner):
    """Bytes of the optimizer's storages that are no mapped file: state, its tensors, and arrays."""
    stored = inner.elsewhere
    arrays = [a.values for a in stored.arrays if isinstance(a, DeviceArray)]
    mains = [p for group in inner.param_groups for p in group["params"] if p.numel()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*arrays, *mains)}.values())


@pytest.mark.parametrize("form, bytes_each", [
    (StateForm(), 12), (StateForm(moments=torch.bfloat16), 8), (StateForm(split=True), 10 + 1 / 8),
    (StateForm(moments=torch.bfloat16, split=True), 6 + 1 / 8), ("swapped", 0), ("split and swapped", 0),
], ids=["plain", "o2", "reuse", "o2 and reuse", "swap", "swap and reuse"])  # fmt: skip
def test_the_state_is_as_small_as_it_should_be(form, bytes_each):
    form = FORMS[form]() if isinstance(form, str) else form
    inner = train(form, torch.bfloat16, steps=1)[1]
    values = sum(slot.numel for slot in inner.elsewhere.slots)
    padding = len(SHAPES) * optimizer_windows.ALIGNMENT * 12
    assert bytes_each * values <= own_bytes(inner) <= bytes_each * values + padding


def test_reloading_takes_the_models_weights():
    for name in ("swapped", "split", "split and swapped"):
        inner = train(FORMS[name](), torch.bfloat16)[1]
        slots = [slot for slot in inner.elsewhere.slots if slot.numel]
        for slot in slots:
            slot.weight.fill_(3)
        assert not any((inner.elsewhere.master(slot.main) == 3).all() for slot in slots[:2])
        inner.elsewhere.reload()
        assert all((inner.elsewhere.master(slot.main) == 3).all() for slot in slots)


def test_what_has_left_is_no_number():
    inner = train(FORMS["swapped"](), torch.bfloat16)[1]
    assert all(slot.main.isnan().all() for slot in inner.elsewhere.slots)
    with pytest.raises(ValueError, match="closure"):
        inner.step(lambda: None)
