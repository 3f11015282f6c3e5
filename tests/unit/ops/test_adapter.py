"""Dropout by counter: the bits are Philox's, their statistics are dropout's, and recomputation draws them again."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from mindspeed_llm.lora.function import LinearKind, adapted_linear
from mindspeed_llm.ops import registry
from mindspeed_llm.ops.adapter import CounterMask, masks_by_counter, philox

torch.set_num_threads(1)

# Counter, key and words, from the known-answer file of Random123 (philox4x32, 10 rounds).
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter, key, words", KNOWN)
def test_philox_gives_the_known_answers(counter, key, words):
    found = philox(tuple(map(torch.tensor, key)), tuple(map(torch.tensor, counter)))
    assert tuple(int(word) for word in found) == words


def mask(probability, seed=5):
    return CounterMask(probability, torch.tensor([seed]))


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_a_mask_has_the_statistics_of_dropout(probability):
    rows, columns = 512, 1000
    kept = mask(probability).kept(rows, columns).double()
    share, deviation = 1 - probability, (probability * (1 - probability)) ** 0.5

    def within(mean, expected, spread, count):
        assert abs(float(mean) - expected) < 5 * spread / count**0.5

    within(kept.mean(), share, deviation, rows * columns)
    centred = (kept - share) / deviation
    for other in (centred.roll(1, 0), centred.roll(1, 1), centred.roll(8, 1)):
        within((centred * other).mean(), 0.0, 1.0, rows * columns)
    another = (mask(probability, seed=6).kept(rows, columns).double() - share) / deviation
    within((centred * another).mean(), 0.0, 1.0, rows * columns)
    within(mask(probability).apply(torch.ones(rows, columns)).mean(), 1.0, deviation / share, rows * columns)
    # By place in a word's halves, of which every eighth column is one.
    assert (
        float((kept.view(rows, -1, 8).mean((0, 1)) - share).abs().max()) < 5 * deviation / (rows * columns / 8) ** 0.5
    )


def test_a_mask_does_not_depend_on_how_much_of_it_is_made():
    whole = mask(0.3).kept(20, 40)
    assert torch.equal(mask(0.3).kept(7, 13), whole[:7, :13])
    assert not torch.equal(mask(0.3, seed=1 << 40).kept(20, 40), whole)


def test_small_and_large_probabilities_are_rounded_to_neither_none_nor_all():
    assert mask(1e-9).threshold == 1 and mask(1 - 1e-9).threshold == 65535
    assert mask(0.1).gain == pytest.approx(1 / 0.9, rel=1e-4)


@pytest.fixture
def by_counter():
    """The operators' formulas, which drop what they read."""
    for operator in ("adapter_down", "adapter_down_gradient", "adapter_up", "adapted_product"):
        registry.select(operator, registry.REFERENCE)
    yield
    registry.reset()


def problem():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((5, 2, 12), (9, 12), (3, 12), (9, 3))]


def gradients(again: bool, forget: bool = False):
    """Of x, A and B of a linear whose mask is drawn inside what is recomputed."""
    x, weight, a, b = problem()
    leaves = [tensor.requires_grad_() for tensor in (x, a, b)]
    torch.manual_seed(3)

    def linear(x):
        drawn = CounterMask.draw(x, 0.4)
        return adapted_linear(x, drawn, weight, None, *leaves[1:], LinearKind(True, False, None, 1, 2.0))

    y = checkpoint(linear, x, use_reentrant=True, preserve_rng_state=not forget) if again else linear(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)] if not again else backward(y, leaves)


def backward(y, leaves):
    y.square().sum().backward()
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def test_recomputation_draws_the_same_mask(by_counter):
    assert masks_by_counter()
    plain = gradients(False)
    assert all(torch.equal(one, other) for one, other in zip(plain, gradients(True), strict=True))
    assert not torch.equal(plain[2], gradients(True, forget=True)[2])


def test_nothing_but_the_input_itself_is_kept(by_counter):
    x, weight, a, b = problem()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        drawn = CounterMask.draw(x, 0.4)
        adapted_linear(
            x.requires_grad_(), drawn, weight, None, a.requires_grad_(), b.requires_grad_(),
            LinearKind(True, False, None, 1, 2.0),
        )  # fmt: skip
    assert {tuple(t.shape) for t in kept} == {(5, 2, 12), (5, 2, 3), (9, 12), (3, 12), (9, 3)}
    assert any(t.data_ptr() == x.data_ptr() for t in kept)
