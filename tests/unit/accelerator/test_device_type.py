"""A program that compares `device.type` with "cuda" hears what it would hear there; nobody else does."""

import copy
import importlib
import pickle

import pytest
import torch

from mindspeed_llm.accelerator import device_type, torch_facade
from mindspeed_llm.accelerator.cpu import CPU

SOURCE = """
import torch

def kind(x): return x.device.type
def kind_of(device): return device.type
def is_cuda(x): return x.device.type == "cuda", "cuda" == x.device.type, x.device.type in ("cuda", "xpu")
def is_other(x): return x.device.type != "cuda", "cuda" != x.device.type, x.device.type == "meta", x.device.type == 0
def is_host(x): return x.device.type == "cpu", not x.device.type != "cpu"
def made_there(x): return torch.zeros(1, device=x.device.type), torch.device(x.device.type)
def cast(x):
    with torch.autocast(x.device.type, torch.bfloat16):
        return x @ x
def checked(x):
    assert x.device.type == "cuda"
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    (tmp_path / "program_that_compares.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(torch_facade, "_installed", None)
    before = torch.device.__dict__["type"]
    torch_facade.install(CPU(), ("program_that_compares",), imports=True)
    yield importlib.reload(importlib.import_module("program_that_compares"))
    torch_facade.uninstall()
    assert torch.device.__dict__["type"] is before


def test_a_tensor_of_the_device_is_cudas_to_the_program(program):
    x = torch.zeros(2, 2)
    assert program.is_cuda(x) == (True, True, True)
    assert program.is_other(x) == (False, False, False, False)
    assert program.is_host(x) == (True, True)
    program.checked(x)


def test_a_tensor_elsewhere_is_not(program):
    x = torch.zeros(2, 2, device="meta")
    assert program.is_cuda(x) == (False, False, False)
    assert program.kind(x) == "meta" and type(program.kind(x)) is str


def test_what_the_program_does_with_the_string_stays_on_the_device(program):
    x = torch.ones(2, 2)
    made, device = program.made_there(x)
    assert made.device == device == torch.device("cpu")
    assert program.cast(x).dtype is torch.bfloat16


def test_the_string_is_the_devices_own_everywhere_else(program):
    x = torch.zeros(2)
    assert x.device.type == "cpu" and x.device.type != "cuda" and type(x.device.type) is str
    handed_on = program.kind(x)
    assert handed_on == "cpu" and handed_on != "cuda" and not handed_on == "cuda", "who compares decides"
    assert hash(handed_on) == hash("cpu") and f"{handed_on}" == "cpu" and type(str(handed_on)) is str
    for again in (pickle.loads(pickle.dumps(handed_on)), copy.deepcopy(handed_on)):
        assert type(again) is str and again == "cpu"
    assert torch.zeros(1, device=handed_on).device == torch.device(handed_on) == torch.device("cpu")


def test_a_compiled_function_of_others_branches_on_the_real_device(program):
    def doubled_on_the_host(x):
        return x * 2 if x.device.type == "cpu" and x.device.type != "cuda" else x

    compiled = torch.compile(doubled_on_the_host, backend="eager", fullgraph=True)
    try:
        assert compiled(torch.ones(2)).tolist() == [2.0, 2.0]
    finally:
        torch._dynamo.reset()


def test_the_houses_own_doors_leave_devices_alone(monkeypatch):
    monkeypatch.setattr(torch_facade, "_installed", None)
    before = torch.device.__dict__["type"]
    torch_facade.install(CPU(), ("megatron",))
    try:
        assert torch.device.__dict__["type"] is before
    finally:
        torch_facade.uninstall()


def test_a_device_that_is_not_given_back_is_noticed(program):
    """The fixture's last line, without what it watches for."""
    before = torch.device.__dict__["type"]
    restore = device_type.install(CPU(), lambda name: True)
    assert torch.device.__dict__["type"] is not before
    assert torch.zeros(1).device.type == "cuda", "installed again, for every module this time"
    restore()
    assert torch.device.__dict__["type"] is before and torch.zeros(1).device.type != "cuda"
