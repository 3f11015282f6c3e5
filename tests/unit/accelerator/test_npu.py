"""Without torch_npu, or with one that cannot be loaded: nothing breaks, and the reason is said."""

import importlib
import importlib.util

import pytest

from mindspeed_llm import accelerator
from mindspeed_llm.accelerator import npu, npu_environment
from mindspeed_llm.errors import UserError


@pytest.fixture(autouse=True)
def _ask_again(monkeypatch):
    for variable in npu_environment.ALWAYS:
        monkeypatch.delenv(variable.name, raising=False)
    npu._problem.cache_clear()
    yield
    npu._problem.cache_clear()
    accelerator.current.cache_clear()


def test_an_absent_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not accelerator.get("npu").is_available()
    monkeypatch.setenv("MINDSPEED_LLM_DEVICE", "npu")
    accelerator.current.cache_clear()
    with pytest.raises(UserError, match="npu is wrong, because the package torch_npu is not installed; legal: .*cpu"):
        accelerator.current()


def test_a_package_without_cann_is_told_apart(monkeypatch):
    def no_library(name):
        raise ImportError("libhccl.so: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", no_library)
    device = accelerator.get("npu")
    assert not device.is_available() and "libhccl.so" in device.why_unavailable()
    assert accelerator.current().name in ("cuda", "cpu")


def test_the_users_variables_stay_and_the_others_are_set(monkeypatch):
    monkeypatch.setenv("TASK_QUEUE_ENABLE", "1")
    npu_environment.set_variables(npu_environment.ALWAYS)
    import os

    assert os.environ["TASK_QUEUE_ENABLE"] == "1" and os.environ["HCCL_CONNECT_TIMEOUT"] == "1800"
    for variable in npu_environment.ALWAYS:
        monkeypatch.delenv(variable.name)


def test_every_variable_is_explained_in_the_documentation():
    from pathlib import Path

    text = (Path(__file__).parents[3] / "docs" / "install.md").read_text()
    for variable in (*npu_environment.ALWAYS, *npu_environment.DETERMINISTIC):
        assert variable.name in text and variable.value in text


def test_options_of_ascend_are_refused_elsewhere():
    from mindspeed_llm.config.parser import parse
    from mindspeed_llm.plan.combinations import combination_problems

    config = parse("pretrain", ["--npu-deterministic", "--hccl-group-buffer", "tp:100", "--device", "cpu"]).config
    lines = [line for line in combination_problems(config) if "Ascend" in line]
    assert len(lines) == 2 and "--npu-deterministic needs an Ascend NPU, and the device is cpu" in lines[0]
