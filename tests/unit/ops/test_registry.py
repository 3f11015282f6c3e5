"""Choosing an implementation is done once, shown, and never silent."""

import pytest
import torch

from mindspeed_llm.errors import UserError
from mindspeed_llm.ops import norm, registry


@pytest.fixture(autouse=True)
def fresh_choices(monkeypatch):
    monkeypatch.setattr(registry, "_implementations", {k: list(v) for k, v in registry._implementations.items()})
    registry.reset()
    yield
    registry.reset()


def test_the_best_available_one_is_chosen_and_shown():
    registry.register("double", "plain")(lambda x: x + x)
    registry.register("double", "fast", priority=1)(lambda x: 2 * x)
    registry.register("double", "absent", requires=("no_such_package",), priority=9)(lambda x: x)
    assert registry.implementation("double")(3) == 6
    assert registry.chosen()["double"] == "fast"
    assert registry.chosen()["rms_norm"] in ("two-pass", "torch")


def test_an_absent_one_is_refused_naming_the_package():
    registry.register("double", "plain")(lambda x: x + x)
    registry.register("double", "absent", requires=("no_such_package",))(lambda x: x)
    with pytest.raises(UserError, match="needs the package no_such_package; legal: plain"):
        registry.select("double", "absent")
    with pytest.raises(UserError, match="none of that name; legal: plain"):
        registry.select("double", "abset")
    with pytest.raises(UserError, match="none is registered"):
        registry.select("treble", "plain")


def test_one_for_another_device_is_refused():
    if registry.accelerator.current().device_type == "cuda":
        pytest.skip("CUDA has it")
    with pytest.raises(UserError, match="it runs on cuda and the device is cpu"):
        registry.select("rms_norm", "torch")


def test_a_selected_one_is_used():
    registry.select("rms_norm", "two-pass")
    assert registry.implementation("rms_norm") is norm.two_pass_rms_norm
    assert norm.rms_norm(torch.ones(1, 4), torch.ones(4), 1e-6).sum() == pytest.approx(4.0)


def test_two_of_one_name_are_a_mistake():
    with pytest.raises(ValueError, match="already"):
        registry.register("rms_norm", "two-pass")(lambda x: x)


def test_what_an_older_torch_lacks_is_not_called(monkeypatch):
    def missing(operator, name):
        (entry,) = (e for e in registry.implementations(operator) if e.name == name)
        return entry.missing("cuda")

    assert missing("grouped_matmul", "grouped_mm") is missing("matmul_accumulate", "addmm_out_dtype") is None
    monkeypatch.delattr(torch, "_grouped_mm")
    monkeypatch.setattr(torch.ops.aten, "addmm", object())
    assert missing("grouped_matmul", "grouped_mm").endswith("has no _grouped_mm")
    assert missing("matmul_accumulate", "addmm_out_dtype").endswith("has no out_dtype")
