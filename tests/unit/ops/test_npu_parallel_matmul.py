"""What the NPU's products over ranks are handed, seen by stand-ins that compute the formula for two ranks alike."""

import types
from unittest import mock

import pytest
import torch

from mindspeed_llm.accelerator.npu import NPU
from mindspeed_llm.ops.npu import parallel_matmul as npu

torch.set_num_threads(1)


class Group:
    def size(self):
        return 2

    def _get_backend(self, device):
        return types.SimpleNamespace(get_hccl_comm_name=lambda rank: f"communicator of rank {rank}")


@pytest.fixture
def kernels(monkeypatch):
    asked = []

    def npu_all_gather_base_mm(self, x2, hcom, world_size, *, bias=None, gather_index=0, gather_output=True):
        asked.append(("gather", list(self.shape), list(x2.shape), hcom, world_size, gather_output))
        gathered = torch.cat((self, self))
        return gathered @ x2, gathered

    def npu_mm_reduce_scatter_base(self, x2, hcom, world_size, *, reduce_op="sum", bias=None):
        asked.append(("scatter", list(self.shape), list(x2.shape), hcom, world_size, reduce_op))
        return 2 * (self @ x2).chunk(2)[0]

    names = types.SimpleNamespace(
        npu_all_gather_base_mm=npu_all_gather_base_mm, npu_mm_reduce_scatter_base=npu_mm_reduce_scatter_base
    )
    monkeypatch.setattr(torch.ops, "npu", names, raising=False)
    monkeypatch.setattr(npu.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(NPU, "ranks_of_fused_communication", lambda self: (2, 4, 8))
    return asked


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).bfloat16()


def test_the_kernels_take_matrices_and_give_the_models_shapes(kernels):
    x, weight = numbers(6, 2, 256), numbers(5, 256)
    y, gathered = npu.npu_all_gather_matmul(x, weight, Group(), 2)
    assert torch.equal(gathered, torch.cat((x, x)))
    torch.testing.assert_close(y, gathered @ weight.t())
    mine = npu.npu_matmul_reduce_scatter(x, weight, Group(), 2)
    torch.testing.assert_close(mine, 2 * (x[:3] @ weight.t()))
    name = "communicator of rank 1"
    assert kernels == [
        ("gather", [12, 256], [256, 5], name, 2, True),
        ("scatter", [12, 256], [256, 5], name, 2, "sum"),
    ]


@pytest.mark.parametrize("x", [numbers(6, 2, 256).float(), numbers(6, 2, 255), numbers(0, 2, 256)])
def test_what_the_kernels_do_not_take_goes_in_chunks(kernels, x):
    weight = torch.zeros(5, x.shape[-1], dtype=x.dtype)
    with mock.patch.object(npu, "chunked_all_gather_matmul") as gather:
        npu.npu_all_gather_matmul(x, weight, Group(), 2)
    with mock.patch.object(npu, "chunked_matmul_reduce_scatter") as scatter:
        npu.npu_matmul_reduce_scatter(x, weight, Group(), 2)
    assert gather.called and scatter.called and not kernels


def test_a_chip_without_the_kernels_goes_in_chunks(kernels, monkeypatch):
    monkeypatch.setattr(NPU, "ranks_of_fused_communication", lambda self: ())
    with mock.patch.object(npu, "chunked_all_gather_matmul") as gather:
        npu.npu_all_gather_matmul(numbers(6, 2, 256), numbers(5, 256), Group(), 2)
    assert gather.called and not kernels
