"""What modules below a prefix see under the name torch, and that nobody else does."""

import importlib
import importlib.machinery
import os
import subprocess
import sys
import textwrap
from unittest import mock

import pytest
import torch

from mindspeed_llm.accelerator import members, torch_facade
from mindspeed_llm.accelerator.cpu import CPU
from mindspeed_llm.errors import UserError

SOURCE = """
import torch
from torch import Tensor, device, zeros
from torch.cuda import _lazy_call as lazy
from torch.cuda.nvtx import range_pop, range_push
from torch.distributed import all_reduce
from torch.distributed.device_mesh import DeviceMesh
from torch.jit import script

TYPES = (torch.FloatTensor, torch.cuda.FloatTensor)

def make(): return torch.zeros(2, device="cuda", pin_memory=True), zeros(1, device=torch.device("cuda:0"))
def move(tensor): return tensor.cuda(), torch.nn.Linear(1, 1).cuda()
def make_layers(): return torch.nn.Linear(1, 1, device="cuda"), torch.nn.LayerNorm(1, device="cuda:0")
def make_like(tensor): return tensor.new_zeros(2, device="cuda"), tensor.new_full((2,), 1.0, device="cuda:0")
def mesh(): return DeviceMesh("cuda", [0]), torch.distributed.device_mesh.init_device_mesh("cuda", (1,)), DeviceMesh
def type_of(tensor): return tensor.type(), tensor.type(torch.float64)
def available(): return torch.cuda.is_available()
def accelerator():
    from torch import accelerator
    return torch.accelerator.current_accelerator(), accelerator.is_available(), torch.accelerator.device_count()
def import_within():
    import torch
    import torch.cuda
    return torch.cuda.is_available()
def is_device(x): return isinstance(x, torch.device) and isinstance(x, device)
def mark_range():
    range_push("a step")
    torch.cuda.nvtx.mark("within")
    return range_pop()
def run_lazily(calls): lazy(lambda: calls.append(1))
@torch.compile
def compiled(x): return x + 1
"""


@pytest.fixture
def subject(tmp_path, monkeypatch):
    """Imports module `subject.code`, with the facade installed before or after."""
    folder = tmp_path / "subject"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "code.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(torch_facade, "_installed", None)

    def load(install_first):
        if not install_first:
            module = importlib.import_module("subject.code")
            torch_facade.install(CPU(), ("subject",))
            return module
        torch_facade.install(CPU(), ("subject",))
        return importlib.import_module("subject.code")

    yield load
    torch_facade.uninstall()
    for name in [name for name in sys.modules if name.startswith("subject")]:
        del sys.modules[name]


needs_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


@needs_no_cuda
@pytest.mark.parametrize("install_first", [True, False])
def test_a_module_that_assumes_cuda_runs_on_the_cpu(subject, install_first):
    code = subject(install_first)
    assert [tensor.device.type for tensor in code.make()] == ["cpu", "cpu"]
    tensor, linear = code.move(torch.ones(1))
    assert tensor.device.type == linear.weight.device.type == "cpu"
    assert code.type_of(torch.ones(1, dtype=torch.bfloat16)) == ("torch.cuda.BFloat16Tensor", torch.ones(1).double())
    assert code.available() and code.is_device(torch.device("cpu")) and not code.is_device("cpu")
    assert isinstance(torch.ones(1), code.TYPES)
    calls = []
    code.run_lazily(calls)
    assert calls == [1]
    assert not hasattr(code.compiled, "_torchdynamo_orig_callable") and code.compiled(1) == 2


@needs_no_cuda
@pytest.mark.parametrize("install_first", [True, False])
def test_ranges_of_nvidias_profiler_are_nobodys(subject, install_first):
    code = subject(install_first)
    assert code.mark_range() == 0
    torch_facade.uninstall()
    assert code.range_push is torch.cuda.nvtx.range_push


@needs_no_cuda
def test_a_function_of_torch_that_is_replaced_is_replaced_for_the_program(subject):
    code = subject(install_first=True)
    held = code.torch.zeros  # as a program holds what it is about to replace
    with mock.patch("torch.zeros", new=lambda *args, **kwargs: held(*args, **kwargs) + 1):
        assert code.make()[0].tolist() == [1.0, 1.0] and code.make()[1].tolist() == [0.0]
        assert held(1).tolist() == [0.0] and torch.zeros(1).tolist() == [1.0]
    assert code.torch.zeros is held and code.make()[0].tolist() == [0.0, 0.0]
    with mock.patch.object(code.torch, "zeros", new=lambda *args, **kwargs: "the program's own"):
        assert code.make()[0] == "the program's own" and torch.zeros(1).tolist() == [0.0]
    assert code.torch.zeros is held


@needs_no_cuda
@pytest.mark.parametrize("name", ["_record_memory_history", "_snapshot"])
def test_recordings_of_cudas_allocator_are_refused_in_one_line(subject, name):
    code = subject(install_first=True)
    with pytest.raises(UserError, match=rf"^torch.cuda.memory.{name}: [^\n]*--record-memory-history\)$"):
        getattr(code.torch.cuda.memory, name)(True)
    assert code.torch.cuda.memory.memory_allocated() >= 0
    torch_facade.uninstall()
    assert getattr(torch.cuda.memory, name).__module__ == "torch.cuda.memory"


@needs_no_cuda
@pytest.mark.parametrize("install_first", [True, False])
def test_layers_and_tensors_like_others_are_made_on_the_cpu(subject, install_first):
    before = dict(vars(torch.nn.Linear)), dict(vars(torch.Tensor))
    code = subject(install_first)
    assert [layer.weight.device.type for layer in code.make_layers()] == ["cpu", "cpu"]
    assert [tensor.tolist() for tensor in code.make_like(torch.ones(1))] == [[0, 0], [1, 1]]
    for function in (torch.nn.Linear, torch.ones(1).new_full):  # called from here, where CUDA means CUDA
        with pytest.raises((RuntimeError, AssertionError)):
            function((1,), 1, device="cuda")
    torch_facade.uninstall()
    assert (dict(vars(torch.nn.Linear)), dict(vars(torch.Tensor))) == before


@needs_no_cuda
@pytest.mark.parametrize("install_first", [True, False])
def test_meshes_are_of_the_cpu(subject, install_first, tmp_path):
    code = subject(install_first)
    started = not torch.distributed.is_initialized()  # by another test of this process
    if started:
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        one, other, kind = code.mesh()
        assert one.device_type == other.device_type == "cpu"
        assert isinstance(other, kind) and not isinstance(1, kind)
        assert kind.from_group(torch.distributed.group.WORLD, "cuda").device_type == "cpu"
    finally:
        if started:
            torch.distributed.destroy_process_group()


@needs_no_cuda
@pytest.mark.parametrize("install_first", [True, False])
def test_a_build_for_cuda_is_no_accelerator(subject, install_first, monkeypatch):
    """A CUDA build of torch names cuda on a machine without it; a job on the CPU has none."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    assert subject(install_first).accelerator() == (None, False, 0)
    torch_facade.uninstall()
    assert torch.accelerator.current_accelerator() == torch.device("cuda")


def test_imports_inside_functions_are_answered_too(subject):
    assert subject(install_first=True).import_within()


@needs_no_cuda
@pytest.mark.parametrize("install_first", [True, False])
def test_nobody_else_notices_and_uninstalling_leaves_no_trace(subject, install_first):
    names = dict(vars(torch)), dict(vars(torch.cuda))
    methods = torch.Tensor.__dict__.get("cuda"), torch.nn.Module.cuda, torch.Tensor.__dict__.get("type")
    finders = list(sys.meta_path)
    code = subject(install_first)
    assert not torch.cuda.is_available() and torch.ones(1).type() == "torch.FloatTensor"
    assert (dict(vars(torch)), dict(vars(torch.cuda))) == names
    with pytest.raises((RuntimeError, AssertionError)):
        torch.ones(1).cuda()
    torch_facade.uninstall()
    assert code.torch is torch and not code.available()
    held = (code.zeros, code.device, code.lazy, code.DeviceMesh, code.script, code.all_reduce)
    own = (torch.zeros, torch.device, torch.cuda._lazy_call, torch.distributed.DeviceMesh, torch.jit.script)
    assert all(mine is theirs for mine, theirs in zip(held, (*own, torch.distributed.all_reduce), strict=True))
    assert (torch.Tensor.__dict__.get("cuda"), torch.nn.Module.cuda, torch.Tensor.__dict__.get("type")) == methods
    assert sys.meta_path == finders


@needs_no_cuda
def test_names_that_are_not_restored_are_noticed(subject, monkeypatch):
    monkeypatch.setattr(torch_facade._Installation, "_restore_imported", lambda self: None)
    code = subject(install_first=True)
    torch_facade.uninstall()
    held = (code.torch, code.zeros, code.device, code.lazy, code.DeviceMesh, code.script, code.all_reduce)
    own = (torch, torch.zeros, torch.device, torch.cuda._lazy_call, torch.distributed.DeviceMesh, torch.jit.script)
    assert not any(mine is theirs for mine, theirs in zip(held, (*own, torch.distributed.all_reduce), strict=True))


@needs_no_cuda
def test_installing_twice_is_installing_once_and_prefixes_add_up(subject):
    code = subject(install_first=True)
    facade, finders = torch_facade.installed(), list(sys.meta_path)
    torch_facade.install(torch_facade._installed.accelerator, ("subject",))
    assert torch_facade.installed() is facade and sys.meta_path == finders
    torch_facade.uninstall()
    cpu = CPU()
    torch_facade.install(cpu, ("elsewhere",))
    assert not code.available()
    torch_facade.install(cpu, ("subject",))
    assert code.available() and code.move(torch.ones(1))[0].device.type == "cpu"
    with pytest.raises(RuntimeError, match="uninstall it before"):
        torch_facade.install(CPU(), ("subject",))


class LaterFinder:
    """Finds modules by itself and comes first, as the hook of pytest that rewrites assertions does."""

    def find_spec(self, name, path, target=None):
        return importlib.machinery.PathFinder.find_spec(name, path, target)


@needs_no_cuda
@pytest.mark.parametrize("something_between", [True, False])
def test_a_finder_that_came_later_is_stepped_before_again(subject, tmp_path, monkeypatch, something_between):
    torch_facade.install(CPU(), ("subject",))
    monkeypatch.setattr(sys, "meta_path", [LaterFinder(), *sys.meta_path])
    if something_between:  # that the later finder leaves to the others; without it the module is found by it alone
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("subject_that_is_nowhere")
    code = importlib.import_module("subject.code")
    assert (code.torch is torch_facade.installed()) == something_between


def test_only_whole_names_are_prefixes():
    assert members.has_prefix("megatron.core", ("megatron",)) and members.has_prefix("megatron", ("megatron",))
    assert not members.has_prefix("megatronic", ("megatron",))


def run(program):
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
@needs_no_cuda
def test_megatron_imports_quietly_and_its_tracker_forks_the_stream_kernels_draw_from():
    done = run(
        """
        import warnings; warnings.simplefilter("default")
        from mindspeed_llm import megatron_adaptor
        import torch
        from megatron.core import tensor_parallel
        from megatron.core.tensor_parallel.random import _set_cuda_rng_state
        from megatron.core.utils import is_te_min_version
        tracker = tensor_parallel.get_cuda_rng_tracker()
        tracker.add("model-parallel-rng", 5)
        torch.manual_seed(1)
        plain = torch.rand(4)
        torch.manual_seed(1)
        with tracker.fork():
            inside = torch.nn.functional.dropout(torch.ones(64))
        with tracker.fork():
            again = torch.nn.functional.dropout(torch.ones(64))
        assert torch.equal(torch.rand(4), plain), "the outer stream moved"
        assert not torch.equal(inside, again), "the forked stream did not move"
        tracker.reset(); tracker.add("model-parallel-rng", 6)
        with tracker.fork():
            assert not torch.equal(torch.nn.functional.dropout(torch.ones(64)), inside)
        assert not is_te_min_version("3.0")
        """
    )
    assert [line for line in done.stderr.splitlines() if "not installed" in line or "RNG" in line] == []


@pytest.mark.slow
@needs_no_cuda
def test_somebody_elses_training_script_runs_unchanged_after_one_import(tmp_path):
    script = tmp_path / "theirs.py"
    script.write_text(
        textwrap.dedent(
            """
            import os
            import torch
            from megatron.core import parallel_state, tensor_parallel
            from mindspeed_llm import megatron_adaptor
            megatron_adaptor.patch(prefixes=("megatron", "__main__"))

            torch.cuda.set_device(0)
            torch.distributed.init_process_group("nccl", init_method=os.environ["STORE"], rank=0, world_size=1)
            parallel_state.initialize_model_parallel(1, 1)
            tensor_parallel.model_parallel_cuda_manual_seed(1)
            linear = torch.nn.Linear(2, 2).cuda()
            x = torch.ones(1, 2, device="cuda", requires_grad=True)
            with torch.cuda.stream(torch.cuda.Stream()), torch.autocast("cuda", dtype=torch.bfloat16):
                linear(x).sum().backward()
            total = x.grad.cuda()
            torch.distributed.all_reduce(total)
            print(total.device, torch.distributed.get_backend(), total.type())
            torch.distributed.destroy_process_group()
            """
        )
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=120,
        env=dict(os.environ, STORE=f"file://{tmp_path}/store"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["cpu", "gloo", "torch.cuda.FloatTensor"]
