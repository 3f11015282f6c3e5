"""The device behind our protocol: memory, streams, random numbers, groups, and what is said when it is not there."""

import os

import pytest
import torch

from mindspeed_llm import accelerator
from mindspeed_llm.accelerator import npu, npu_environment
from mindspeed_llm.errors import UserError

MEGABYTE = 2**20


@pytest.fixture
def device():
    return accelerator.get("npu")


def test_it_is_chosen_and_answers_the_whole_protocol(device):
    from mindspeed_llm.accelerator.protocol import Accelerator

    assert accelerator.current() is device and device.why_unavailable() == ""
    missing = [name for name in dir(Accelerator) if not name.startswith("_") and not hasattr(device, name)]
    assert missing == []
    assert device.device_count() == 2 and device.current_device() == torch.device("npu", 0)
    assert device.peak_flops(torch.bfloat16) is None and device.model() == "Ascend910B2 (A2)"


@pytest.mark.parametrize(
    "chip, generation",
    [
        ("Ascend910B2", "A2"),
        ("Ascend910B4", "A2"),
        ("Ascend910_9391", "A3"),
        ("Ascend950PR", "A5"),
        ("Ascend310P", None),
    ],
)
def test_generations_of_chips(chip, generation):
    assert npu.generation_of(chip) == generation


def test_torch_itself_is_not_changed(device):
    assert not torch.cuda.is_available() and not torch.randn(2, device="npu").is_cuda
    assert "torch_npu.contrib.transfer_to_npu" not in __import__("sys").modules


def test_memory_is_counted_by_the_real_allocator(device):
    before = device.memory_allocated()
    block = torch.empty(3 * MEGABYTE, dtype=torch.uint8, device="npu")
    assert device.memory_allocated() - before == pytest.approx(3 * MEGABYTE, abs=1024)
    del block
    assert device.memory_allocated() == before
    assert device.peak_memory_allocated() - before == pytest.approx(3 * MEGABYTE, abs=1024)
    device.reset_peak_memory()
    assert device.peak_memory_allocated() == before
    assert device.memory_total() == 1024 * MEGABYTE


def test_the_highest_memory_is_known_after_a_reset(device):
    before = device.highest_memory_allocated()
    torch.empty(before + 5 * MEGABYTE, dtype=torch.uint8, device="npu")
    highest = device.highest_memory_allocated()
    assert highest >= before + 5 * MEGABYTE
    device.reset_peak_memory()
    assert device.peak_memory_allocated() < highest == device.highest_memory_allocated()
    torch.npu.reset_peak_memory_stats()  # not through us
    assert device.highest_memory_allocated() == highest


def test_a_device_that_is_full_says_so_and_goes_on(device):
    held = torch.empty(600 * MEGABYTE, dtype=torch.uint8, device="npu")
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 60[0-9].00 MiB.*1024.00 MiB total"):
        torch.empty(600 * MEGABYTE, dtype=torch.uint8, device="npu")
    del held
    device.empty_cache()
    assert torch.zeros(600 * MEGABYTE, dtype=torch.uint8, device="npu")[-1] == 0
    device.empty_cache()


def test_host_memory_is_pinned_and_copied_both_ways(device):
    host = torch.arange(1000.0).pin_memory()
    assert host.is_pinned()
    moved = host.to("npu", non_blocking=True)
    back = torch.empty(1000, pin_memory=True)
    back.copy_(moved * 2, non_blocking=True)
    device.synchronize()
    assert torch.equal(back, host * 2)


def test_a_storage_that_is_emptied_frees_its_memory(device):
    tensor = torch.ones(MEGABYTE, device="npu")
    held = device.memory_allocated()
    tensor.untyped_storage().resize_(0)
    assert held - device.memory_allocated() == pytest.approx(4 * MEGABYTE, abs=1024)
    tensor.untyped_storage().resize_(4 * MEGABYTE)
    tensor.fill_(3.0)
    assert float(tensor.sum()) == 3.0 * MEGABYTE


def test_streams_and_events(device):
    side, start, end = device.new_stream(), device.new_event(enable_timing=True), device.new_event(enable_timing=True)
    start.record()
    with device.stream(side):
        side.wait_event(start)
        assert device.current_stream() == side
        doubled = torch.ones(8, device="npu") * 2
        end.record()
    device.current_stream().wait_event(end)
    end.synchronize()
    assert end.query() and start.elapsed_time(end) >= 0 and float(doubled.sum()) == 16


def test_random_numbers_repeat_from_a_state_and_leave_the_hosts_alone(device):
    torch.manual_seed(3)  # also the device's
    host = torch.get_rng_state()
    state = device.generator().get_state()
    first = torch.rand(100, device="npu")
    second = torch.nn.functional.dropout(torch.ones(100, device="npu"), 0.5)
    assert not torch.equal(device.generator().get_state(), state)
    device.generator().set_state(state)
    assert torch.equal(torch.rand(100, device="npu"), first)
    assert torch.equal(torch.nn.functional.dropout(torch.ones(100, device="npu"), 0.5), second)
    assert torch.equal(torch.get_rng_state(), host)
    assert 20 < float((second > 0).sum()) < 80


@pytest.mark.parametrize("index", [0, 1])
def test_threads_of_a_checkpoint_use_device_and_queue_of_the_thread_that_asked(device, tmp_path, monkeypatch, index):
    from mindspeed_llm.checkpoint import stored_boxes, write_part
    from mindspeed_llm.checkpoint.boxes import Box

    used, as_bytes, read = [], write_part.as_bytes, stored_boxes._read_region

    def noting(function):
        return lambda *given: used.append((torch.npu.current_device(), torch.npu.current_stream())) or function(*given)

    monkeypatch.setattr(write_part, "as_bytes", noting(as_bytes))
    monkeypatch.setattr(stored_boxes, "_read_region", noting(read))
    device.set_device(index)
    try:
        plain, queue = device.current_stream(), device.new_stream()
        values = torch.arange(4.0, device="npu")
        with device.stream(queue):
            write_part.write_part(tmp_path, 0, [Box("weight", (4,), (0,), values)], {}, {})
        write_part.merge_parts(tmp_path, [0], {}, lambda facts: {})
        target = torch.zeros(4, device="npu")
        stored_boxes.StoredBoxes(tmp_path).fill([Box("weight", (4,), (0,), target)])
        assert torch.equal(target.cpu(), torch.arange(4.0))
        assert used == [(index, queue), (index, plain)] and queue != plain
    finally:
        device.set_device(0)


def test_tensors_of_two_devices_do_not_mix():
    weight, on_device = torch.randn(4, 4), torch.randn(4, 4, device="npu")
    with pytest.raises(RuntimeError, match="same device"):
        on_device @ weight
    assert torch.equal((on_device * torch.tensor(2.0)).cpu(), on_device.cpu() * 2)
    assert torch.equal(on_device[torch.tensor([2, 0])].cpu(), on_device.cpu()[[2, 0]])


def test_a_view_that_a_kernel_returns_shares_its_memory():
    whole = torch.zeros(4, 3, device="npu")
    for part in whole.unbind(0):
        part += 1
    whole[1:3].mul_(2)
    whole.t()[0].fill_(7)
    assert torch.equal(whole.cpu(), torch.tensor([[7.0, 1, 1], [7, 2, 2], [7, 2, 2], [7, 1, 1]]))


def test_megatron_sees_the_device_where_it_says_cuda(device):
    from mindspeed_llm.accelerator import torch_facade

    torch_facade.install(device)
    facade = torch_facade.installed()
    assert facade.cuda.is_available() and facade.cuda.current_device() == torch.device("npu", 0)
    assert facade.empty(3, device="cuda").device.type == "npu"
    assert facade.device("cuda") == torch.device("npu") and facade.device("cuda:1") == torch.device("npu", 0)
    assert facade.get_rng_state is torch.get_rng_state  # the host's stream is another than the device's
    assert isinstance(torch.zeros(1, device="npu"), facade.cuda.FloatTensor)


def test_sizes_of_buffers_reach_hccls_options(device):
    from mindspeed_llm.config.hccl_groups import parse_buffers

    assert device.group_options("TENSOR_MODEL_PARALLEL_GROUP") is None
    device.set_group_buffers(parse_buffers("tp:300;default:64"))
    try:
        tensor, other = (device.group_options(name) for name in ("TENSOR_MODEL_PARALLEL_GROUP", "DATA_PARALLEL_GROUP"))
        assert tensor.hccl_config == {"hccl_buffer_size": 300}
        assert other.hccl_config == {"hccl_buffer_size": 64}
    finally:
        device.set_group_buffers({})


def test_determinism_is_asked_of_every_library(device, monkeypatch):
    for variable in npu_environment.DETERMINISTIC:
        monkeypatch.delenv(variable.name, raising=False)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda mode: asked.append(mode))
    asked = []
    device.be_deterministic()
    assert asked == [True] and os.environ["HCCL_DETERMINISTIC"] == "TRUE"
    monkeypatch.setenv("HCCL_DETERMINISTIC", "FALSE")
    with pytest.raises(UserError, match="HCCL_DETERMINISTIC: 'FALSE' is wrong.*legal: TRUE"):
        device.be_deterministic()


def test_what_the_user_has_set_stays(monkeypatch):
    assert os.environ["TASK_QUEUE_ENABLE"] == "0"  # the simulator's
    assert os.environ["HCCL_CONNECT_TIMEOUT"] == "1800"


def test_float64_is_summed_although_hccl_cannot():
    import torch.distributed as dist

    from mindspeed_llm.parallel.exact_sum import sum_float64
    from mindspeed_llm.parallel.setup import initialize_process_group

    initialize_process_group()
    assert dist.get_backend() == "hccl"
    values = torch.tensor([1.0, 2.0**-40], dtype=torch.float64, device="npu")
    with pytest.raises(RuntimeError, match="float64 cannot be reduced"):
        dist.all_reduce(values)
    sum_float64(values)
    assert values.tolist() == [1.0, 2.0**-40]
