"""What activation swap moves and what it leaves alone, on chains of small functions."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from mindspeed_llm.memory.allowance import UpToHostBytes, WhatHides
from mindspeed_llm.memory.mapped_store import MappedStore
from mindspeed_llm.memory.order import Event, Order
from mindspeed_llm.memory.swap import ActivationSwap

ROWS, WIDTH = 40, 30
SIZE = 4 * ROWS * WIDTH


def new_swap(limit=10**9, **more):
    store = MappedStore()
    return ActivationSwap(store, UpToHostBytes(store, limit), **{"small": 1000, **more})


class Chain:
    """Layers x -> function(x); each is a pass of its own, and what it saves swaps."""

    def __init__(self, swap, layers=5, function=lambda x, weight: torch.tanh(x * weight)):
        generator = torch.Generator().manual_seed(0)
        self.swap, self.function = swap, function
        self.weights = [torch.rand(WIDTH, generator=generator).requires_grad_() for _ in range(layers)]

    def forward(self, x):
        if self.swap:
            self.swap.begin_chunk([x])
        for number, weight in enumerate(self.weights):
            if self.swap is None:
                x = self.function(x, weight)
                continue
            self.swap.begin_layer(number)
            with self.swap.running.saving():
                x = self.function(x, weight)
            self.swap.end_layer(x)
        return x

    def step(self, seed=1):
        """Gradients of the weights."""
        x = torch.rand(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed))
        for weight in self.weights:
            weight.grad = None
        self.forward(x).square().sum().backward()
        return [weight.grad for weight in self.weights]


def assert_same(swap, steps=3, **chain):
    ours, plain = Chain(swap, **chain), Chain(None, **chain)
    for step in range(steps):
        for a, b in zip(ours.step(step), plain.step(step), strict=True):
            assert torch.equal(a, b)
    assert swap.store.held == 0


def test_gradients_are_those_without_and_storages_go():
    swap = new_swap()
    assert_same(swap)
    # tanh's output, saved by two layers, is one storage.
    assert swap.swapped_bytes == 3 * 4 * SIZE
    assert swap.late == 0


def test_memory_of_what_went_is_free():
    swap, seen = new_swap(), []

    def function(x, weight):
        saved = x * weight
        seen.append(StorageWeakRef(saved.untyped_storage()))
        return saved.exp().sin()  # exp saves its output, sin its input: the same

    chain = Chain(swap, function=function)
    out = chain.forward(torch.rand(ROWS, WIDTH))
    assert [reference.expired() for reference in seen] == [True] * 5
    assert swap.store.held == 9 * SIZE  # of each layer what it gets and exp's output, but for what was given
    out.sum().backward()
    assert swap.store.held == 0


def test_views_of_one_storage_go_once_and_share_it_again():
    swap, pointers = new_swap(), []

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            both = torch.cat([x, x * weight])
            first, second = both.chunk(2)
            ctx.save_for_backward(first, second.t(), weight)
            return first * second

        @staticmethod
        def backward(ctx, grad):
            first, second, weight = ctx.saved_tensors
            pointers.append(first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr())
            assert second.stride() == (1, WIDTH) and second.storage_offset() == ROWS * WIDTH
            return grad * 2 * first * weight, (grad * first * first + 0 * second.t()).sum(0)

    assert_same(swap, steps=1, function=Product.apply)
    assert pointers == [True] * 10  # with swap and without
    assert swap.swapped_bytes == 4 * 2 * SIZE  # the last layer's return at once


def test_what_others_hold_stays_and_is_left_alone_the_next_time():
    swap, held = new_swap(), []

    def function(x, weight):
        product = x * weight
        held.append(product.detach())
        return product.sin()  # saves the product

    chain = Chain(swap, function=function)
    sent = []
    send = swap.store.send
    swap.store.send = lambda source: sent.append(source.untyped_storage()._cdata) or send(source)
    first = chain.step()
    products = {tensor.untyped_storage()._cdata for tensor in held}
    assert products & set(sent) and len(swap.held_elsewhere) == 4
    sent.clear(), held.clear()
    again = chain.step()
    assert not {tensor.untyped_storage()._cdata for tensor in held[:-1]} & set(sent)
    assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_parameters_small_tensors_and_what_is_given_stay():
    chain = Chain(None, layers=3)
    swap = new_swap(long_lived=lambda: chain.weights, small=10)
    sent = []
    send = swap.store.send
    swap.store.send = lambda source: sent.append(source.untyped_storage()._cdata) or send(source)
    chain.swap = swap
    x = torch.rand(ROWS, WIDTH)
    chain.forward(x).sum().backward()
    staying = {tensor.untyped_storage()._cdata for tensor in [x, *chain.weights]}
    assert sent and not staying & set(sent)
    assert_same(new_swap(small=SIZE + 1))
    nothing = new_swap(small=SIZE + 1)
    Chain(nothing).step()
    assert nothing.swapped_bytes == 0


def test_writing_into_what_was_saved_is_refused():
    """Without hooks autograd notices this in the backward pass."""

    def function(x, weight):
        product = x * weight
        out = product.sin()
        with torch.no_grad():
            product.zero_()
        return out

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        Chain(new_swap(), function=function).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        Chain(new_swap(small=10**9), function=function).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        Chain(None, function=function).step()


def test_a_graph_can_be_run_through_twice():
    chain = Chain(new_swap())
    out = chain.forward(torch.rand(ROWS, WIDTH)).sum()
    out.backward(retain_graph=True)
    first = [weight.grad.clone() for weight in chain.weights]
    out.backward()
    assert all(torch.equal(2 * a, weight.grad) for a, weight in zip(first, chain.weights))


def test_a_forward_pass_that_fails_or_is_never_run_back_harms_nothing():
    swap = new_swap()
    chain = Chain(swap)
    expected = Chain(None).step()
    chain.step()

    def failing(x, weight):
        if weight is chain.weights[3]:
            raise ArithmeticError
        return torch.tanh(x * weight)

    good, chain.function = chain.function, failing
    with pytest.raises(ArithmeticError):
        chain.step()
    chain.function = good
    chain.forward(torch.rand(ROWS, WIDTH))
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(chain.step(), expected))
    assert swap.store.held == 0


def test_a_budget_is_kept():
    swap = new_swap(limit=2 * SIZE)
    chain = Chain(swap)
    out = chain.forward(torch.rand(ROWS, WIDTH))
    assert swap.store.held == 2 * SIZE
    out.sum().backward()
    assert_same(new_swap(limit=2 * SIZE))


def test_nothing_that_moves_is_said():
    said = []
    swap = new_swap(small=10**9, say=said.append)
    for _ in range(5):
        Chain(swap).step()
    assert said == ["swap: nothing moves: no saved tensor is large enough, or every one is needed at once"]


class Measured:
    """A store whose copies take so many seconds."""

    held, kind = 0, "nowhere"

    def __init__(self, seconds):
        self.seconds, self.measuring = seconds, []

    def measure(self, on):
        self.measuring.append(on)

    def seconds_sending(self):
        return self.seconds


@pytest.mark.parametrize("seconds, fraction", [(1e-9, 1.0), (2.0, 0.45), (10.0, 0.09)])
def test_what_hides_is_the_part_that_transfers_in_the_time_of_computing(monkeypatch, seconds, fraction):
    """Three layers of a third of a second each, whose copies together take so long."""
    store = Measured(seconds)
    allowance = WhatHides(store)
    clock = iter(range(1000))

    class Mark:
        def __init__(self):
            self.at = next(clock) / 3

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 1e3 * (end.at - self.at)

    monkeypatch.setattr(allowance, "_mark", Mark)
    lines = []
    for number in range(6):
        lines.append(allowance.begin_round())
        if number < 4:
            assert allowance.choose({0: 100, 1: 300}) == [0, 1]
        allowance.begin_layer()
        allowance.end_layer(400)
    assert store.measuring == [True, False]
    assert allowance.fraction == pytest.approx(fraction)
    assert [line is None for line in lines] == [True] * 4 + [False, True]
    assert f"{100 * fraction:.0f} %" in lines[4]


def test_of_a_part_the_largest_that_fit_go():
    allowance = WhatHides(Measured(1.0))
    allowance.fraction = 0.5
    assert allowance.choose({0: 10, 1: 40, 2: 30, 3: 20}) == [0, 1]
    allowance.fraction = 0.05
    assert allowance.choose({0: 10, 1: 40, 2: 30, 3: 20}) == []


def see(order, text):
    """Events like "f0 f1 b1 b0", and what was said to come next after each."""
    said = []
    for word in text.split():
        order.see(Event(word[0] == "b", int(word[1:])))
        said.append(order.next_backward())
    return said


def test_the_order_of_a_pipeline_is_learned():
    order, steady = Order(), "f0 f1 f2 f3 b1 b0 f4 f5 b3 b2 b5 b4"
    order.begin()
    assert see(order, steady) == [None] * 4 + [0, None, None, None, 2, 1, 4, 3]
    order.begin()
    assert see(order, steady) == [None, None, None, 1, 0, None, None, 3, 2, 5, 4, None]
    order.begin()
    assert see(order, "f0 f1 b1 b0") == [None, None, 0, None]  # another order than before


def test_who_returns_at_once_is_known_the_second_time():
    order = Order()
    order.begin()
    assert not order.returns_at_once(0)
    see(order, "f0 f1 b1 b0")
    order.begin()
    assert not order.returns_at_once(0)
    see(order, "f0")
    assert order.returns_at_once(1)
