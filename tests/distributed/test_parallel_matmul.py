"""Products that send in parts while they multiply give what plain ones give, however late what was sent arrives."""

import contextlib
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from mindspeed_llm.errors import UserError
from mindspeed_llm.ops import parallel_matmul
from mindspeed_llm.testing.layouts import assert_same, make_rows, train
from mindspeed_llm.testing.pool import pool

SP = "--tensor-model-parallel-size {} --sequence-parallel"
ROWS = make_rows(8)


class Late:
    """A collective that happens when it is waited for, as one whose wires are slow; what it reads may change until."""

    def __init__(self, run, result):
        self.run = run
        result.fill_(float("nan"))

    def wait(self):
        self.run()


@contextlib.contextmanager
def late_collectives(forget_to_wait=False):
    """Asynchronous gathers and scatters are done at `wait`, or as in a program that does not wait, never."""
    patches = []
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        original = getattr(dist, name)

        def late(out, given, group=None, async_op=False, original=original):
            if not async_op:
                return original(out, given, group=group)
            work = Late(lambda: original(out, given, group=group), out)
            if forget_to_wait:
                work.wait = lambda: None
            return work

        patches.append(mock.patch.object(dist, name, late))
    with patches[0], patches[1]:
        yield


def products(chunks, late=False, forget=False, batch=2):
    """Both operators against their formulas: the largest differences on this rank."""
    group, t, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(8, 2 * batch, 6, generator=generator, dtype=torch.float64)[:, ::2]  # rows with gaps between
    whole = torch.randn(8 * t, batch, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    with late_collectives(forget) if late else contextlib.nullcontext():
        y, gathered = parallel_matmul.all_gather_matmul(x, weight, group, chunks)
        mine = parallel_matmul.matmul_reduce_scatter(whole, weight, group, chunks)
        turned, _ = parallel_matmul.all_gather_matmul(x, weight.t().contiguous().t(), group, chunks)
    expected, all_rows = parallel_matmul.gather_then_multiply(x, weight, group, 1)
    expected_mine = parallel_matmul.multiply_then_scatter(whole, weight, group, 1)
    pairs = ((y, expected), (gathered, all_rows), (mine, expected_mine), (turned, expected))
    return max(float((a - b).abs().max().nan_to_num(nan=1e9)) if b.numel() else 0.0 for a, b in pairs)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("chunks", parallel_matmul.CHUNKS)
def test_products_in_any_number_of_chunks_are_the_plain_ones(ranks, chunks):
    assert max(pool(ranks).run(products, chunks)) < 1e-12
    assert max(pool(ranks).run(products, chunks, True)) < 1e-12


def test_a_product_that_does_not_wait_is_noticed():
    assert max(pool(2).run(products, 4, True, True)) > 1


def test_no_rows_at_all():
    assert max(pool(2).run(products, 2, False, False, 0)) == 0.0


def test_chunks_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match="multiple of 3; legal: 6, 9"):
        parallel_matmul.check_chunks(8, 3)


def train_late(*arguments):
    with late_collectives():
        return train(*arguments)


@pytest.fixture(scope="module")
def alone(toy_qwen):
    return {extra: pool(1).run(train, str(toy_qwen), extra, ROWS)[0] for extra in ("", "--lora-r 4 --lora-alpha 8")}


@pytest.mark.parametrize(
    "ranks, chunks, extra",
    [
        (2, 2, ""),
        (4, 4, ""),
        (2, 4, "--gradient-accumulation-fusion"),
        (2, 2, "--lora-r 4 --lora-alpha 8"),
        (2, 1, ""),
    ],
)
def test_training_is_the_same(alone, toy_qwen, ranks, chunks, extra):
    flags = f"{SP.format(ranks)} --use-ascend-coc --coc-parallel-num {chunks} {extra}"
    found = pool(ranks).run(train_late, str(toy_qwen), flags, ROWS)[0]
    assert_same(found, alone[extra if "lora" in extra else ""])
