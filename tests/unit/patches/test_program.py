"""Which packages are the program's without being named."""

import importlib
import sys

import pytest
import torch

from mindspeed_llm import accelerator, patches
from mindspeed_llm.accelerator import torch_facade


@pytest.fixture
def module_of(tmp_path, monkeypatch):
    """Makes a package of some name whose function asks for the device, under a program that is patched."""
    from mindspeed_llm import megatron_adaptor

    monkeypatch.syspath_prepend(tmp_path)
    made = []

    def make(name):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("import torch\n\ndevice = lambda: torch.cuda.current_device()\n")
        made.append(name)
        sys.modules.pop(name, None)
        importlib.invalidate_caches()
        return importlib.import_module(name)

    megatron_adaptor.unpatch()
    megatron_adaptor.patch()
    yield make
    # As the rest of the suite has it: the doors' facade, without stand-ins.
    megatron_adaptor.unpatch()
    torch_facade.install(accelerator.current())
    patches.apply()
    for name in made:
        sys.modules.pop(name, None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch.cuda is what it says there")
def test_the_package_of_local_checkpoints_sees_the_device_and_others_do_not(module_of):
    assert torch.device(module_of("nvidia_resiliency_ext").device()).type != "cuda"
    with pytest.raises((AssertionError, RuntimeError), match="CUDA|NVIDIA"):
        module_of("somebody_elses_extension").device()
