"""The CPU behind the accelerator protocol, and how a device is chosen."""

import mmap

import pytest
import torch

from mindspeed_llm import accelerator
from mindspeed_llm.accelerator.cpu import CPU, HostEvent, HostStream
from mindspeed_llm.errors import UserError


def public(kind):
    return {name for name in vars(kind) if not name.startswith("_")} | set(getattr(kind, "__annotations__", {}))


@pytest.mark.parametrize("name", accelerator.NAMES)
def test_every_accelerator_answers_the_whole_protocol(name):
    from mindspeed_llm.accelerator.protocol import Accelerator

    missing = [wanted for wanted in public(Accelerator) if not hasattr(accelerator.get(name), wanted)]
    assert missing == []


def test_the_environment_names_the_device(monkeypatch):
    accelerator.current.cache_clear()
    monkeypatch.setenv("MINDSPEED_LLM_DEVICE", "cpu")
    assert accelerator.current().name == "cpu"
    accelerator.current.cache_clear()
    monkeypatch.setenv("MINDSPEED_LLM_DEVICE", "tpu")
    with pytest.raises(UserError, match="'tpu'.*legal: cuda, npu, cpu"):
        accelerator.current()
    if not torch.cuda.is_available():
        monkeypatch.setenv("MINDSPEED_LLM_DEVICE", "cuda")
        with pytest.raises(UserError, match="legal: cpu"):
            accelerator.current()
    accelerator.current.cache_clear()


def test_selecting_a_device_takes_the_facade_along(monkeypatch):
    from mindspeed_llm.accelerator import torch_facade

    monkeypatch.setenv("MINDSPEED_LLM_DEVICE", "")
    try:
        assert accelerator.select("cpu") is accelerator.current() is accelerator.get("cpu")
        facade = torch_facade.installed()
        assert facade is not None
        accelerator.select("cpu")
        assert torch_facade.installed() is facade
        if not torch.cuda.is_available():
            with pytest.raises(UserError, match="device: cuda is wrong.*legal: cpu"):
                accelerator.select("cuda")
        assert accelerator.current().name == "cpu"
    finally:
        accelerator.current.cache_clear()


def test_events_measure_milliseconds():
    cpu = CPU()
    start, end = cpu.new_event(enable_timing=True), cpu.new_event(enable_timing=True)
    start.record()
    sum(range(200_000))
    end.record()
    assert 0.1 < start.elapsed_time(end) < 10_000
    with pytest.raises(RuntimeError, match="recorded"):
        start.elapsed_time(cpu.new_event())


@pytest.mark.parametrize(
    "name, flops",
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12)]
    + [
        (name, None)
        for name in ("NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA A100-PCIE-40GB", "Tesla V100-SXM2-32GB")
    ],
)
def test_a_gpu_whose_peak_is_not_known_has_none(monkeypatch, name, flops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert accelerator.get("cuda").peak_flops(torch.bfloat16) == flops
    assert accelerator.get("cuda").peak_flops(torch.float32) is None


def test_memory_is_of_this_process():
    cpu = CPU()
    before = cpu.resident_memory()
    # Memory of its own: what malloc gives a tensor depends on all that the process did before.
    block = torch.frombuffer(mmap.mmap(-1, 64 * 2**20), dtype=torch.uint8).fill_(1)
    assert 60 * 2**20 < cpu.resident_memory() - before < 100 * 2**20
    assert cpu.peak_resident_memory() >= cpu.resident_memory() - 2**20
    assert cpu.resident_memory() < cpu.memory_total()
    del block


def test_no_number_is_invented_for_the_speed_of_a_cpu():
    assert CPU().peak_flops(torch.bfloat16) is None


def test_the_facade_asks_a_device_nothing_before_it_is_used(monkeypatch):
    from mindspeed_llm.accelerator.cuda_namespace import CudaNamespace

    asked = []
    for name in ("memory_total", "memory_allocated", "new_stream", "new_event", "current_stream", "generator"):
        monkeypatch.setattr(CPU, name, lambda self, *args, name=name: asked.append(name) or 0)
    namespace = CudaNamespace(CPU())
    assert asked == []
    assert namespace.Stream is HostStream and namespace.Event is HostEvent
    assert namespace.get_device_properties(0).total_memory == 0 and asked == ["memory_total"]
