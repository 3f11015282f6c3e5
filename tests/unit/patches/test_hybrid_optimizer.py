"""Parameters whose optimizer is on the host are updated, also where host and device are one."""

import pytest
import torch

from mindspeed_llm import accelerator, patches, patching
from mindspeed_llm.accelerator import tensor_methods, torch_facade

NAME = "offloaded-by-copy"


def trained(fraction, dtype=torch.float32, **options):
    """Parameters after three steps of a HybridDeviceOptimizer, and after three of Adam."""
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

    torch.manual_seed(0)
    start = [torch.randn(3, 4), torch.randn(5), torch.randn(2, 2)]
    ours, theirs = ([torch.nn.Parameter(value.to(dtype, copy=True)) for value in start] for _ in range(2))
    groups = [{"params": ours[:1], "lr": 1e-2}, {"params": ours[1:], "lr": 1e-3}]
    hybrid = HybridDeviceOptimizer(
        groups,
        offload_fraction=fraction,
        lr=1e-2,
        cpu_optimizer_cls=torch.optim.Adam,
        gpu_optimizer_cls=torch.optim.Adam,
        **options,
    )
    plain = torch.optim.Adam([{"params": theirs[:1], "lr": 1e-2}, {"params": theirs[1:], "lr": 1e-3}])
    for _ in range(3):
        for left, right in zip(ours, theirs):
            left.grad = torch.randn_like(left)
            right.grad = left.grad.clone()
        hybrid.step()
        plain.step()
    return start, ours, theirs, hybrid


@pytest.fixture
def program():
    """megatron's modules see the facade, and are patched: as the doors have it, and the rest of the suite."""
    torch_facade.install(accelerator.current())
    patches.apply()
    yield
    patches.apply()


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("overlap", [False, True])
def test_every_parameter_takes_adams_steps(program, fraction, overlap):
    _, ours, theirs, _ = trained(fraction, overlap_cpu_optimizer_d2h_h2d=overlap)
    for left, right in zip(ours, theirs):
        assert left.equal(right)


def test_the_fraction_decides_how_many_are_offloaded(program):
    for fraction, expected in ((0.0, 0), (0.1, 1), (0.6, 2), (1.0, 3)):
        hybrid = trained(fraction)[3]
        assert len(hybrid.gpu_params_map_cpu_copy) == expected
        assert all(copy is not param for param, copy in hybrid.gpu_params_map_cpu_copy.items())


def test_half_precision_is_updated_in_fp32(program):
    for fraction in (0.0, 1.0):
        start, ours, _, hybrid = trained(fraction, torch.bfloat16, param_update_in_fp32=True)
        for value, param in zip(start, ours):
            wide = hybrid.param_to_fp32_param[param]
            assert wide.dtype == torch.float32 and param.equal(wide.to(torch.bfloat16))
            assert not param.equal(value.to(torch.bfloat16))


def test_a_program_hears_which_states_are_on_the_host(program):
    namespace = {"__name__": "megatron.somewhere"}
    exec("def asks(tensor): return tensor.is_cuda", namespace)
    for undone in ([], ["offloaded-states-are-the-hosts"]):
        patching.undo(undone)
        for fraction, on_host in ((0.0, 0), (0.6, 2), (1.0, 3)):
            hybrid = trained(fraction)[3]
            heard = [namespace["asks"](state["exp_avg"]) for state in hybrid.state.values()]
            assert heard.count(False) == (0 if undone else on_host) and len(heard) == 3


def test_a_program_hears_it_of_loaded_states_too(program):
    for undone in ([], ["offloaded-states-are-the-hosts-when-loaded"]):
        patching.undo(undone)
        hybrid, saved = trained(0.6)[3], trained(0.6)[3].state_dict()
        hybrid.load_state_dict(saved)
        heard = [tensor_methods.is_of_host(state["exp_avg"]) for state in hybrid.state.values()]
        assert heard.count(True) == (0 if undone else 2) and len(heard) == 3


def test_without_the_patch_offloaded_parameters_stand_still(program):
    patching.undo([NAME])
    start, ours, theirs, _ = trained(1.0)
    assert all(param.equal(value) for param, value in zip(ours, start))
    assert not any(param.equal(value) for param, value in zip(theirs, start))
