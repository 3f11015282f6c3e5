"""Batch-invariant mode off CUDA: what becomes of a row does not depend on the rows beside it."""

import functools

import pytest
import torch
import torch.nn.functional as F

from mindspeed_llm import accelerator, patches
from mindspeed_llm.accelerator import torch_facade


@pytest.fixture(scope="module")
def kernels():
    """megatron's module, under the adaptor."""
    from mindspeed_llm import megatron_adaptor

    torch.set_num_threads(1)
    megatron_adaptor.unpatch()
    megatron_adaptor.patch()
    from megatron.core.transformer.custom_layers import batch_invariant_kernels

    yield batch_invariant_kernels
    megatron_adaptor.unpatch()
    torch_facade.install(accelerator.current())
    patches.apply()


def batches(width, dtype):
    """One row alone, and with others beside it: (rows, where the row is)."""
    draw = torch.Generator().manual_seed(0)
    row = torch.randn(1, width, generator=draw)
    for number, place in ((1, 0), (2, 1), (3, 0), (17, 5), (49, 48)):
        rows = torch.randn(number, width, generator=draw)
        rows[place] = row
        yield rows.to(dtype), place


def is_invariant(function, width, dtype):
    results = [function(rows)[place] for rows, place in batches(width, dtype)]
    return all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_are_and_plain_ones_are_not(kernels, dtype, transposed):
    plain = []
    for width, out in ((129, 257), (257, 8), (512, 100), (64, 1)):
        b = torch.randn(width, out).to(dtype)
        b = b.t().contiguous().t() if transposed else b
        bias = torch.randn(out).to(dtype)
        by_rows = functools.partial(kernels.matmul_persistent, b=b, bias=bias)
        assert is_invariant(by_rows, width, dtype)
        plain.append(is_invariant(functools.partial(torch.addmm, bias, mat2=b), width, dtype))
        a = next(batches(width, dtype))[0]
        right = (a.double() @ b.double() + bias.double()).to(dtype)
        torch.testing.assert_close(by_rows(a), right, atol=1e-4, rtol=2 * torch.finfo(dtype).eps)
    # The control: torch's own products are not, in the type that its libraries compute in.
    assert dtype != torch.float32 or not all(plain)


@pytest.mark.parametrize("built_for", [None, torch.device("cuda")])
def test_the_mode_redirects_torch_and_ends(kernels, monkeypatch, built_for):
    """With any build of torch: one for CUDA names that device on a machine that has none."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: built_for)
    weight, bias = torch.randn(257, 129), torch.randn(257)
    functions = {
        "linear": lambda x: F.linear(x, weight, bias),
        "without bias": lambda x: x @ weight.t(),
        "log_softmax": lambda x: x.log_softmax(-1),
        "mean": lambda x: x.mean(-1, keepdim=True),
    }
    x = torch.randn(49, 129)
    before = {name: function(x) for name, function in functions.items()}
    with kernels.set_batch_invariant_mode(True):
        for name, function in functions.items():
            assert is_invariant(function, 129, torch.float32), name
            torch.testing.assert_close(function(x), before[name], atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(x.mean(0), x.sum(0) / 49)
    assert all(torch.equal(function(x), before[name]) for name, function in functions.items())
    assert not is_invariant(functions["linear"], 129, torch.float32)


def test_kernels_of_another_device_are_noticed(kernels, monkeypatch):
    """The control: registered for the device of the build, they are never called."""
    weight, bias = torch.randn(257, 129), torch.randn(257)
    monkeypatch.setattr(kernels.torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    with kernels.set_batch_invariant_mode(True):
        assert not is_invariant(lambda x: F.linear(x, weight, bias), 129, torch.float32)


def test_a_vector_is_one_row(kernels):
    x = torch.randn(129)
    torch.testing.assert_close(kernels.log_softmax(x), x.log_softmax(-1))
    for keepdim in (False, True):
        torch.testing.assert_close(kernels.mean_dim(x, 0, keepdim=keepdim), x.mean(0, keepdim=keepdim))


def test_the_norm_of_transformer_engine_is_redirected_and_given_back(kernels):
    from mindspeed_llm.models.stand_ins import transformer_engine as te

    norm, x = te.pytorch.RMSNorm(64), torch.randn(5, 64)
    forward, right = te.pytorch.RMSNorm.forward, norm(x)
    with kernels.set_batch_invariant_mode(True):
        assert te.pytorch.RMSNorm.forward is not forward
        torch.testing.assert_close(norm(x), right)
    assert te.pytorch.RMSNorm.forward is forward


def test_shapes_that_do_not_fit_are_refused(kernels):
    with pytest.raises(ValueError, match="cannot be multiplied"):
        kernels.matmul_persistent(torch.ones(2, 3), torch.ones(4, 5))
    with pytest.raises(ValueError, match="the last one"):
        kernels.log_softmax(torch.ones(2, 3), dim=0)
    with pytest.raises(ValueError, match="legal: -2 to 1"):
        kernels.mean_dim(torch.ones(2, 3), dim=2)
