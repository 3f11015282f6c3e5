"""Where host and device are one, a program that takes them for two still gets what it would get with two."""

import datetime
import importlib
import os
import time

import pytest
import torch

from mindspeed_llm.accelerator import gloo_device, host_random, tensor_methods, torch_facade
from mindspeed_llm.accelerator.cpu import CPU
from mindspeed_llm.testing.pool import pool

SOURCE = """
import torch

def offload(data):
    kept = data.cpu()
    data.zero_()
    return kept
def stage(data):
    kept = data.to("cpu", non_blocking=True)
    data.zero_()
    return kept
def stay(data): return data.to(torch.cuda.current_device()), data.cuda(), data.to(torch.float32)
def asks(data): return data.is_cuda
def draws(): return torch.randn(2)
def seeds(host, device):
    torch.manual_seed(host)
    torch.cuda.manual_seed(device)
def host_state(): return torch.get_rng_state()
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    (tmp_path / "program_of_two.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(torch_facade, "_installed", None)
    monkeypatch.setattr(host_random, "_seeded", False)
    torch_facade.install(CPU(), ("program_of_two",))
    yield importlib.reload(importlib.import_module("program_of_two"))
    torch_facade.uninstall()


@pytest.mark.parametrize("way", ["offload", "stage"])
def test_what_is_copied_to_the_host_outlives_the_device_tensor(program, way):
    assert getattr(program, way)(torch.ones(3)).tolist() == [1.0, 1.0, 1.0]


def test_the_copy_passes_gradients(program):
    x = torch.ones(2, requires_grad=True)
    namespace = vars(program)
    exec("def double(x): return (x.cpu() * 2).sum()", namespace)
    program.double(x).backward()
    assert x.grad.tolist() == [2.0, 2.0]


def test_an_expanded_tensor_is_moved_row_by_row(program):
    rows = torch.zeros(3).expand(2, 3)
    _, moved, of_other_type = program.stay(rows)
    moved[0, 0] = 1.0
    assert moved.tolist() == [[1, 0, 0], [0, 0, 0]]
    assert of_other_type is rows and not rows.any()


def test_a_tensor_that_was_put_on_the_host_says_so_until_it_is_moved(program):
    x = torch.ones(2)
    assert program.asks(x)
    tensor_methods.mark_of_host(x)
    assert not program.asks(x) and not x.is_cuda
    moved = program.stay(x)[1]
    assert program.asks(moved) and moved.equal(x)


def test_nothing_is_copied_on_the_device_or_for_anybody_else(program):
    x = torch.ones(3)
    assert all(moved is x for moved in program.stay(x))
    assert x.cpu() is x and x.to("cpu") is x


def test_the_copy_ends_with_the_facade(program):
    torch_facade.uninstall()
    assert program.offload(torch.ones(3)).tolist() == [0.0, 0.0, 0.0]


def test_the_host_has_a_stream_of_its_own_once_the_program_has_seeded_it(program):
    program.seeds(5, 6)
    expected = torch.randn(2, generator=torch.Generator().manual_seed(5))
    of_device = torch.default_generator.get_state()
    before = program.host_state()
    with host_random.drawing():
        assert program.draws().equal(expected)
    assert torch.default_generator.get_state().equal(of_device)
    assert not program.host_state().equal(before)
    assert program.draws().equal(torch.randn(2, generator=torch.Generator().manual_seed(6)))


def test_streams_that_somebody_else_seeded_stay_one(program):
    torch.manual_seed(7)
    with host_random.drawing():
        assert program.draws().equal(torch.randn(2, generator=torch.Generator().manual_seed(7)))


def _shapes():
    """Collectives whose tensors have as many elements as they must, in other shapes."""
    rank = torch.distributed.get_rank()
    facade = torch_facade.TorchFacade(CPU()).distributed
    gathered = torch.empty(8)
    facade.all_gather_into_tensor(gathered, torch.full((2, 2), float(rank)))
    named = torch.empty(8)
    facade.all_gather_into_tensor(output_tensor=named, input_tensor=torch.full((2, 2), float(rank)), group=None)
    assert torch.equal(named, gathered.view(-1))
    share = torch.empty(2, 2)
    facade.reduce_scatter_tensor(share, torch.arange(8.0) + rank, group=torch.distributed.group.WORLD)
    try:
        torch.distributed.all_gather_into_tensor(torch.empty(8), torch.zeros(2, 2))
    except RuntimeError as error:
        return gathered.tolist(), share.flatten().tolist(), str(error)


def test_collectives_ask_for_numbers_of_elements_as_nccl_does():
    for rank, (gathered, share, refused) in enumerate(pool(2).run(_shapes)):
        assert gathered == [0.0] * 4 + [1.0] * 4
        assert share == [2.0 * (4 * rank + index) + 1 for index in range(4)]
        assert "invalid tensor size" in refused, "gloo asks for shapes, or this facade is needed no more"


def _threads():
    return len(os.listdir("/proc/self/task"))


def _groups():
    """Threads that ten groups add, and what they add up to: as the facade makes them, and as torch does."""
    found = []
    for make in (torch_facade.TorchFacade(CPU()).distributed.new_group, torch.distributed.new_group):
        make([0, 1], backend="gloo")  # the one that makes the device
        before = _threads()
        groups = [make([0, 1], backend="gloo") for _ in range(10)]
        total = torch.ones(1)
        for group in groups:
            torch.distributed.all_reduce(total, group=group)
        found.append((_threads() - before, total.item(), type(groups[0]), torch.distributed.get_backend(groups[0])))
        while groups:
            torch.distributed.destroy_process_group(groups.pop())
        del group  # the last one, whose threads would end within the next count
    return [entry[:2] for entry in found], found[0][2:] == found[1][2:]


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted in Linux's /proc")
def test_groups_share_one_network_thread():
    for ((threads, total), (threads_of_torch, total_of_torch)), same in pool(2).run(_groups):
        assert total == total_of_torch == 2.0**10 and same
        assert threads_of_torch - threads == 10, "each group of torch's has a device, and its thread, of its own"


def _threads_of_groups_of_one():
    """Threads of ten groups that each rank has alone, and of as many that both share."""
    new_group = torch_facade.TorchFacade(CPU()).distributed.new_group
    first, found = new_group([0, 1], backend="gloo"), []  # the one that makes the device
    for ranks in ([[0], [1]], [[0, 1]]):
        before = _threads()
        groups = [new_group(of_rank, backend="gloo") for _ in range(10) for of_rank in ranks]
        found.append(_threads() - before)
        torch.distributed.barrier()  # a rank that ends a group closes the connection that another still makes
        for group in groups:
            if group is not torch.distributed.GroupMember.NON_GROUP_MEMBER:
                torch.distributed.destroy_process_group(group)
        del group, groups
    torch.distributed.destroy_process_group(first)
    return found


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted in Linux's /proc")
def test_a_group_of_one_rank_has_one_worker():
    assert pool(2).run(_threads_of_groups_of_one) == [[10, 20], [10, 20]]


def _pairs(with_members):
    """The sum over this rank's pair, which only its own ranks make; what went wrong where it cannot be made."""
    rank = torch.distributed.get_rank()
    pair = [rank - rank % 2, rank - rank % 2 + 1]
    make = torch_facade.TorchFacade(CPU()).distributed.new_group if with_members else torch.distributed.new_group
    time.sleep({0: 0.0, 2: 0.3, 1: 0.6, 3: 0.9}[rank])  # rank 2 tells its address before rank 1 asks for rank 0's
    try:
        total, group = torch.full((1,), float(rank)), make(pair, timeout=datetime.timedelta(seconds=2))
        torch.distributed.all_reduce(total, group=group)
    except RuntimeError as error:
        return str(error)
    torch.distributed.destroy_process_group(group)
    return total.item()


def test_pairs_that_only_their_own_ranks_make_are_apart():
    assert pool(4).run(_pairs, True) == [1.0, 1.0, 5.0, 5.0]
    assert pool(4).run(_pairs, False) != [1.0, 1.0, 5.0, 5.0], "torch's own groups meet under one name"


def _subgroups():
    """What a group of each rank alone, asked for with nccl, sums up to."""
    facade, rank = torch_facade.TorchFacade(CPU()).distributed, torch.distributed.get_rank()
    found = []
    for own, made in (
        facade.new_subgroups_by_enumeration([[0], [1]], backend="nccl"),
        facade.new_subgroups(1, backend="nccl"),
    ):
        total = torch.full((1,), float(rank))
        torch.distributed.all_reduce(total, group=own)
        found.append((total.item(), torch.distributed.get_backend(own), len(made)))
        torch.distributed.destroy_process_group(own)
    return found


def test_subgroups_asked_for_with_nccl():
    for rank, found in enumerate(pool(2).run(_subgroups)):
        assert found == [(float(rank), "gloo", 2)] * 2


def test_what_stands_in_for_torchs_functions_is_called(monkeypatch):
    facade = torch_facade.TorchFacade(CPU()).distributed
    monkeypatch.setattr(torch.distributed, "new_group", lambda *args, **kwargs: (args, kwargs))
    assert facade.new_group([0], backend="nccl") == (([0],), {"backend": "nccl"})


def test_torch_makes_its_own_groups_again_afterwards():
    plain = torch.distributed.distributed_c10d.ProcessGroupGloo
    with pytest.raises(RuntimeError), gloo_device.shared():
        assert torch.distributed.distributed_c10d.ProcessGroupGloo is not plain
        raise RuntimeError
    assert torch.distributed.distributed_c10d.ProcessGroupGloo is plain


def test_a_wait_for_a_group_that_never_comes_still_ends(tmp_path):
    import datetime

    store = torch.distributed.FileStore(str(tmp_path / "store"), 2)
    begin = time.monotonic()
    with gloo_device.shared(), pytest.raises(RuntimeError):
        torch.distributed.distributed_c10d.ProcessGroupGloo(store, 0, 2, timeout=datetime.timedelta(seconds=1))
    assert time.monotonic() - begin < 20


def test_readings_without_a_sensor_are_no_numbers():
    cuda = torch_facade.TorchFacade(CPU()).cuda
    readings = [cuda.temperature(), cuda.power_draw(0), cuda.utilization(device=0), cuda.clock_rate()]
    assert all(reading != reading for reading in readings)
    with pytest.raises((AssertionError, RuntimeError, ModuleNotFoundError)):  # torch's own has nobody to ask
        torch.cuda.temperature()
