"""Attention in blocks equals the formula, and falls back where it must."""

import pytest
import torch

from mindspeed_llm.ops import attention_blocks
from mindspeed_llm.ops.attention import reference, sdpa
from mindspeed_llm.ops.attention_blocks import BLOCK_ROWS, LONGEST_KEPT, block_attention


def inputs(s, b=1, n=4, g=2, d=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(s)
    shapes = ((s, b, n, d), (s, b, g, d), (s, b, g, d))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    grad = torch.randn(s, b, n * d, generator=generator, dtype=torch.float64).to(dtype)
    return [x.requires_grad_() for x in (q, k, v)], grad


def with_gradients(function, tensors, grad):
    out = function(*tensors)
    return [out, *torch.autograd.grad(out, tensors, grad)]


def blocks(q, k, v):
    return block_attention(q, k, v, None, 0.0, None)


def error(found, exact):
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(found, exact))


@pytest.mark.parametrize("s", [1, 2, BLOCK_ROWS, BLOCK_ROWS + 1, 3 * BLOCK_ROWS + 7])
@pytest.mark.parametrize("b, n, g", [(1, 6, 2), (2, 4, 4), (3, 4, 1)])
def test_equals_the_formula(s, b, n, g):
    tensors, grad = inputs(s, b, n, g)
    exact = with_gradients(reference, tensors, grad)
    assert all(
        torch.allclose(f, e, rtol=1e-12, atol=1e-12) for f, e in zip(with_gradients(blocks, tensors, grad), exact)
    )


def test_a_mask_that_is_off_by_one_is_noticed(monkeypatch):
    tensors, grad = inputs(2 * BLOCK_ROWS)
    exact = with_gradients(reference, tensors, grad)
    assert error(with_gradients(blocks, tensors, grad), exact) < 1e-12

    def one_too_many(heads, dtype):
        rows = 2 * BLOCK_ROWS
        return torch.full((rows, rows), float("-inf"), dtype=dtype).triu_(2)[:, None, :].expand(rows, heads, rows)

    monkeypatch.setattr(attention_blocks, "_hidden", one_too_many)
    assert error(with_gradients(blocks, tensors, grad), exact) > 1e-3


def test_bf16_is_as_exact_as_torchs_flash_kernel():
    tensors, grad = inputs(200, n=12, g=4, d=64, dtype=torch.bfloat16)
    exact = with_gradients(reference, [x.detach().double().requires_grad_() for x in tensors], grad.double())
    flash = with_gradients(lambda q, k, v: sdpa(q, k, v, None, 0.0, None), tensors, grad)
    assert error(with_gradients(blocks, tensors, grad), exact) < 1.2 * error(flash, exact)


def test_inputs_are_not_written_to():
    for dtype in (torch.float32, torch.float64):
        tensors, grad = inputs(100, dtype=dtype)
        before = [x.detach().clone() for x in (*tensors, grad)]
        with_gradients(blocks, tensors, grad)
        assert all(torch.equal(a, b) for a, b in zip(before, (*tensors, grad)))


@pytest.mark.parametrize("s, window, dropout", [(LONGEST_KEPT + 1, None, 0.0), (9, 4, 0.0), (9, None, 0.5)])
def test_what_it_has_no_form_for_is_torchs(s, window, dropout):
    tensors, _ = inputs(s, n=2, g=2, dtype=torch.float32)
    torch.manual_seed(0)
    found = block_attention(*tensors, window, dropout, None)
    torch.manual_seed(0)
    assert torch.equal(found, sdpa(*tensors, window, dropout, None))


def test_the_value_does_not_depend_on_whether_gradients_are_wanted():
    """Recomputed activations must be the ones that were dropped."""
    tensors, _ = inputs(150, dtype=torch.float32)
    wanted = blocks(*tensors)
    with torch.no_grad():
        assert torch.equal(blocks(*tensors), wanted)
