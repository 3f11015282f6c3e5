"""Losses over a vocabulary cut among ranks equal those over the whole of it, from logits and from hidden states."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist

from mindspeed_llm.ops import registry
from mindspeed_llm.ops.cross_entropy import linear_cross_entropy_sum, vocab_parallel_cross_entropy
from mindspeed_llm.testing.pool import pool

VOCABULARY, PADDED = 21, 24


def inputs():
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(9, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(PADDED, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, VOCABULARY, (9,), generator=generator)
    labels[::4] = -100
    return hidden, weight, labels


def own(tensor, dim):
    return tensor.chunk(dist.get_world_size(), dim)[dist.get_rank()].clone().requires_grad_()


def from_logits(implementation, without_maximum=False):
    """Losses and the gradient of this rank's logits."""
    hidden, weight, labels = inputs()
    logits = own(hidden @ weight.t() * 100, 1)
    registry.select("vocab_parallel_cross_entropy", implementation)
    original = dist.all_reduce

    def all_reduce(tensor, op=dist.ReduceOp.SUM, group=None):
        if not (without_maximum and op == dist.ReduceOp.MAX):
            original(tensor, op, group)

    try:
        with mock.patch.object(dist, "all_reduce", all_reduce):
            loss = vocab_parallel_cross_entropy(logits, labels, dist.group.WORLD)
        loss.sum().backward()
    finally:
        registry.reset()
    return loss.detach(), logits.grad


def from_hidden(implementation, chunk_rows=None):
    """The sum of the losses, this rank's part of the gradient of the hidden states, that of its weights."""
    hidden, weight, labels = inputs()
    hidden, weight = hidden.requires_grad_(), own(weight, 0)
    registry.select("linear_cross_entropy_sum", implementation)
    try:
        loss = linear_cross_entropy_sum(
            hidden, weight, labels, vocab_size=VOCABULARY, group=dist.group.WORLD, chunk_rows=chunk_rows
        )
        loss.backward()
    finally:
        registry.reset()
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("implementation", ["torch", "reference"])
def test_from_logits(ranks, implementation):
    hidden, weight, labels = inputs()
    logits = (hidden @ weight.t() * 100).requires_grad_()
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    expected.sum().backward()
    found = pool(ranks).run(from_logits, implementation)
    for loss, _ in found:
        torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.cat([gradient for _, gradient in found], 1), logits.grad)


def test_ranks_that_subtract_different_maxima_are_noticed():
    hidden, weight, labels = inputs()
    expected = torch.nn.functional.cross_entropy(hidden @ weight.t() * 100, labels, reduction="none")
    found = pool(2).run(from_logits, "torch", True)
    assert not torch.allclose(found[0][0], expected)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("implementation, chunk_rows", [("chunked", None), ("chunked", 2), ("reference", None)])
def test_from_hidden_states(ranks, implementation, chunk_rows):
    hidden, weight, labels = inputs()
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    expected = torch.nn.functional.cross_entropy((hidden @ weight.t())[:, :VOCABULARY], labels, reduction="sum")
    expected.backward()
    found = pool(ranks).run(from_hidden, implementation, chunk_rows)
    for loss, _, _ in found:
        torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(sum(part for _, part, _ in found), hidden.grad)
    torch.testing.assert_close(torch.cat([part for _, _, part in found]), weight.grad)
