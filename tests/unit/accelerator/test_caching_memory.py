"""CUDA and Ascend devices count memory alike, each in its own namespace of torch."""

import types

import pytest
import torch

from mindspeed_llm.accelerator import host_memory
from mindspeed_llm.accelerator.cuda import CUDA
from mindspeed_llm.accelerator.npu import NPU
from mindspeed_llm.accelerator.out_of_memory import SEGMENT_BYTES


class Namespace(types.SimpleNamespace):
    """What torch.cuda and torch.npu say of a device with 100 MiB free, on which tensors have 30 of 50 MiB."""

    def __init__(self):
        super().__init__(peak=40, emptied=0, free=100)

    def memory_allocated(self):
        return 30 << 20

    def memory_reserved(self):
        return 50 << 20

    def max_memory_allocated(self):
        return self.peak << 20

    def reset_peak_memory_stats(self):
        self.peak = 30

    def mem_get_info(self):
        return self.free << 20, 1 << 30

    def empty_cache(self):
        self.emptied += 1


@pytest.mark.parametrize("kind, other", [(CUDA, "npu"), (NPU, "cuda")])
def test_memory_is_counted_by_the_device_s_own_namespace(monkeypatch, kind, other):
    told = Namespace()
    monkeypatch.setattr(torch, kind.name, told, raising=False)
    monkeypatch.setattr(torch, other, None, raising=False)
    device = kind()
    assert (device.memory_allocated(), device.peak_memory_allocated()) == (30 << 20, 40 << 20)
    assert device.memory_room() == (100 + 20) << 20
    assert device.memory_in_pieces() == (20 << 20) + SEGMENT_BYTES
    told.free = 3  # less than the allocator asks for
    assert device.memory_in_pieces() == (20 + 3) << 20
    device.reset_peak_memory()
    assert (device.peak_memory_allocated(), device.highest_memory_allocated()) == (30 << 20, 40 << 20)
    device.empty_cache()
    assert told.emptied == 1
    assert abs(device.resident_memory() - host_memory.resident_bytes()) < 16 << 20
