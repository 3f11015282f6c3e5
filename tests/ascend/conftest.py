"""Tests on a simulated Ascend NPU: `cases/` runs in processes of its own, see test_simulated.py."""

import os

import pytest

SIMULATED = "ASCEND_SIMULATOR" in os.environ
collect_ignore = ["test_simulated.py"] if SIMULATED else ["cases"]

if SIMULATED:
    import simulator

    simulator.start()


@pytest.fixture(autouse=SIMULATED)
def _device_of_its_own():
    """The next test starts with the device's generator, statistics and operators as the first one did."""
    import torch

    from mindspeed_llm.ops import registry

    torch.npu.manual_seed(0)
    torch.npu.reset_peak_memory_stats()
    yield
    registry.reset()
