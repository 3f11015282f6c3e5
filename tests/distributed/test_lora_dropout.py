"""Dropout by counter in front of adapters: every form of a tensor-parallel linear is the formula in one process."""

import itertools

import pytest
import torch
import torch.distributed as dist

from mindspeed_llm.lora.function import FrozenLinearWithAdapter, LinearKind
from mindspeed_llm.ops.adapter import CounterMask
from mindspeed_llm.testing.pool import pool


def share(x, axis):
    return x if axis is None else x.chunk(dist.get_world_size(), axis)[dist.get_rank()].contiguous()


def compare(column, sequence_parallel, chunks, wrong_seed=0):
    """Largest difference of output and gradients, on this rank, from the formula of one process in fp64."""
    t, me = dist.get_world_size(), dist.get_rank()
    draw = torch.Generator().manual_seed(0)
    x, weight, a, b, dy = (
        torch.randn(*size, generator=draw, dtype=torch.float64)
        for size in ((4 * t, 2, 8 * t), (5 * t, 8 * t), (3, 8 * t), (5 * t, 3), (4 * t, 2, 5 * t))
    )
    rows = 0 if sequence_parallel else None
    of_x, of_y, of_w = (rows, 2, 0) if column else (2, rows, 1)
    of_a, of_b = (None, 0) if column else (1, None)
    # Ranks that hold the same x draw the same seed, the others draw their own.
    masks = [CounterMask(0.4, torch.tensor([7 if of_x is None else 100 + rank])) for rank in range(t)]
    parts = x.chunk(t, of_x) if of_x is not None else [x]
    dropped = [mask.apply(torch.ones_like(part)) for mask, part in zip(masks, parts)]
    keep = torch.cat(dropped, of_x) if of_x is not None else dropped[0]
    leaves = [tensor.requires_grad_() for tensor in (x, a, b)]
    y = x @ weight.t() + 2.0 * ((x * keep) @ a.t()) @ b.t()
    expected = [share(y.detach(), of_y), *torch.autograd.grad(y, leaves, dy)]
    expected[1:] = [share(tensor, axis) for tensor, axis in zip(expected[1:], (of_x, of_a, of_b))]
    own = [share(tensor.detach(), axis).clone().requires_grad_() for tensor, axis in zip(leaves, (of_x, of_a, of_b))]
    mask = CounterMask(0.4, masks[me].seed + wrong_seed)
    kind = LinearKind(column, sequence_parallel, dist.group.WORLD, t, 2.0, chunks)
    out = FrozenLinearWithAdapter.apply(own[0], mask, share(weight, of_w), None, own[1], own[2], kind)
    out.backward(share(dy, of_y))
    if sequence_parallel:  # as megatron does with gradients that are shares of a sum
        dist.all_reduce((own[1] if column else own[2]).grad)
    pairs = zip([out, *(leaf.grad for leaf in own)], expected, strict=True)
    return max(float((one - other).abs().max().nan_to_num(nan=1e9)) for one, other in pairs)


def compare_all():
    cases = itertools.product((True, False), (True, False), (1, 2))
    return max((compare(*case), case) for case in cases)


def test_every_form_is_the_formula():
    for worst, case in pool(2).run(compare_all):
        assert worst < 1e-11, case


@pytest.mark.parametrize("column", [True, False])
def test_another_mask_than_that_of_the_formula_is_noticed(column):
    assert min(pool(2).run(compare, column, True, 1, 1)) > 1e-2
