"""PREMUL_SUM over gloo: what every collective returns and leaves alone, beside plain arithmetic."""

import gc

import pytest
import torch

from mindspeed_llm.accelerator import premultiplied_sum, torch_facade
from mindspeed_llm.accelerator.cpu import CPU
from mindspeed_llm.testing.pool import pool

# A third is not a number of any of these types, and the ranks' factors differ.
FACTORS = (1 / 3, 0.7)


def _input(rank, dtype, length=6):
    return torch.randn(length, generator=torch.Generator().manual_seed(rank)).to(dtype)


def _expected(dtype):
    """The sum of the products, each of numbers of `dtype` and rounded to it."""
    products = [_input(rank, dtype) * torch.tensor(FACTORS[rank], dtype=dtype) for rank in (0, 1)]
    return products[0] + products[1]


def _collectives(distributed, dtype, factor_in_tensor, asynchronous):
    """Every collective's result, what it should be, and whether what it only reads is as before."""
    rank = torch.distributed.get_rank()
    factor = torch.tensor([FACTORS[rank]], dtype=dtype) if factor_in_tensor else FACTORS[rank]
    op, total, share = distributed._make_nccl_premul_sum(factor), _expected(dtype), slice(3 * rank, 3 * rank + 3)
    own, found = _input(rank, dtype), {}

    def end(work):
        gc.collect()  # what only the work under way refers to
        if asynchronous:
            work.wait()

    summed = own.clone().requires_grad_()
    end(distributed.all_reduce(summed, op, async_op=asynchronous))
    found["all_reduce"] = torch.equal(summed.detach(), total)

    both = [own.clone(), own.clone()]
    distributed.all_reduce_coalesced(both, op=op)
    found["all_reduce_coalesced"] = all(torch.equal(one, total) for one in both)

    for name in ("dst", "group_dst"):
        reduced = own.clone()
        end(distributed.reduce(reduced, op=op, async_op=asynchronous, **{name: 1}))
        found["reduce to " + name] = torch.equal(reduced, total if rank == 1 else own)

    given, out = list(own.clone().split(3)), torch.empty(3, dtype=dtype)
    end(distributed.reduce_scatter(out, given, op=op, async_op=asynchronous))
    found["reduce_scatter"] = torch.equal(out, total[share]) and torch.equal(torch.cat(given), own)

    for name in ("reduce_scatter_tensor", "_reduce_scatter_base"):
        given, out = own.clone().view(2, 3), torch.empty(3, dtype=dtype)
        end(getattr(distributed, name)(out, given, op, None, asynchronous))
        found[name] = torch.equal(out, total[share]) and torch.equal(given.flatten(), own)
    return found


def _by_the_facade(dtype, factor_in_tensor, asynchronous):
    return _collectives(torch_facade.TorchFacade(CPU()).distributed, dtype, factor_in_tensor, asynchronous)


@pytest.mark.parametrize("dtype", premultiplied_sum.DTYPES, ids=str)
def test_every_collective_is_the_sum_of_products(dtype):
    for found in pool(2).run(_by_the_facade, dtype, False, True):
        assert found and all(found.values()), found


def test_a_factor_may_be_a_tensor_and_the_collective_synchronous():
    for found in pool(2).run(_by_the_facade, torch.float32, True, False):
        assert found and all(found.values()), found


def _with_a_sum_only():
    """The control: the same comparison where nothing multiplies."""
    multiply = dict(premultiplied_sum.COLLECTIVES)
    premultiplied_sum.COLLECTIVES.update({name: lambda given, product: None for name in multiply})
    try:
        return _by_the_facade(torch.float32, False, False)
    finally:
        premultiplied_sum.COLLECTIVES.update(multiply)


def _multiplied_where_they_are():
    """The control: inputs that a collective only reads are multiplied in place."""
    multiply = dict(premultiplied_sum.COLLECTIVES)
    in_place = {
        "reduce": lambda given, product: product(given["tensor"], out=given["tensor"]),
        "reduce_scatter": lambda given, product: [product(one, out=one) for one in given["input_list"]],
        "reduce_scatter_tensor": lambda given, product: product(given["input"], out=given["input"]),
    }
    premultiplied_sum.COLLECTIVES.update(in_place)
    try:
        found = _by_the_facade(torch.float32, False, False)
        return [found[name] for name in ("reduce to dst", "reduce_scatter", "reduce_scatter_tensor")]
    finally:
        premultiplied_sum.COLLECTIVES.update(multiply)


def test_the_comparison_sees_a_missing_product_and_a_changed_input():
    for found in pool(2).run(_with_a_sum_only):
        assert not any(found[name] for name in found if not name.startswith("reduce to")), found
    rank_0, rank_1 = pool(2).run(_multiplied_where_they_are)
    assert rank_0 == [False, False, False], "rank 0 is not the root of the reduction"
    assert rank_1 == [True, False, False]


def _others():
    """Plain sums, maxima, whole numbers, a group of the other rank alone, and what torch's own function says."""
    distributed, rank = torch_facade.TorchFacade(CPU()).distributed, torch.distributed.get_rank()
    op = distributed._make_nccl_premul_sum(0.5)
    largest, whole = torch.tensor([1.0 + rank]), torch.tensor([2])
    distributed.all_reduce(largest, torch.distributed.ReduceOp(torch.distributed.ReduceOp.MAX))
    with pytest.raises(TypeError, match=r"torch\.int64 is wrong; legal: torch\.float16"):
        distributed.all_reduce(whole, op)
    with pytest.raises((RuntimeError, ValueError)):
        torch.distributed.all_reduce(torch.ones(1), op)
    other, apart = distributed.new_group([1]), torch.ones(1)
    distributed.all_reduce(apart, op, group=other)
    if rank == 1:
        torch.distributed.destroy_process_group(other)
    return largest.item(), whole.item(), apart.item()


def test_what_is_not_multiplied():
    assert pool(2).run(_others) == [(2.0, 2, 1.0), (2.0, 2, 0.5)]


def test_what_stands_in_for_torchs_collectives_is_called(monkeypatch):
    distributed = torch_facade.TorchFacade(CPU()).distributed
    for name in (*premultiplied_sum.COLLECTIVES, "all_gather_into_tensor"):
        monkeypatch.setattr(torch.distributed, name, lambda *args: args)
        assert getattr(distributed, name)("given") == ("given",), name
