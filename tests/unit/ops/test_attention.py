"""Attention against its formula, forward and backward, in fp64; and documents never mix."""

import pytest
import torch

from mindspeed_llm.ops import attention as attention_op

torch.set_num_threads(1)


def random(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def assert_same(function, formula, inputs, tolerance=1e-10):
    """Outputs and the gradients of all inputs agree, for one random direction."""
    found, expected = function(*inputs), formula(*inputs)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5), dtype=expected.dtype)
    of_found = torch.autograd.grad(found, inputs, direction)
    of_expected = torch.autograd.grad(expected, inputs, direction)
    for one, other in zip(of_found, of_expected):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
def test_attention_is_causal_grouped_and_windowed(groups, window):
    inputs = random(9, 2, 6, 8), random(9, 2, groups, 8, seed=1), random(9, 2, groups, 8, seed=2)
    assert_same(
        lambda q, k, v: attention_op.attention(q, k, v, window_size=window),
        lambda q, k, v: attention_op.reference(q, k, v, window_size=window),
        inputs,
    )


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("window", [None, 4])
def test_attention_of_the_newest_positions_sees_the_whole_cache(queries, window):
    inputs = random(queries, 2, 4, 8), random(7, 2, 2, 8, seed=1), random(7, 2, 2, 8, seed=2)
    assert_same(
        lambda q, k, v: attention_op.attention(q, k, v, window_size=window),
        lambda q, k, v: attention_op.reference(q, k, v, window_size=window),
        inputs,
    )


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("boundaries", [[0, 12], [0, 5, 12], [0, 1, 2, 9, 9, 12]])
def test_packed_attention_equals_the_formula(boundaries, window):
    cu_seqlens = torch.tensor(boundaries, dtype=torch.int32)
    inputs = random(12, 1, 4, 8), random(12, 1, 2, 8, seed=1), random(12, 1, 2, 8, seed=2)
    assert_same(
        lambda q, k, v: attention_op.attention(q, k, v, cu_seqlens=cu_seqlens, window_size=window),
        lambda q, k, v: attention_op.reference(q, k, v, cu_seqlens=cu_seqlens, window_size=window),
        inputs,
    )


def changed_rows(cu_seqlens, dtype):
    """Rows of the output that change when the first document's keys and values do."""
    q, k, v = random(12, 1, 4, 8, dtype=dtype), random(12, 1, 2, 8, dtype=dtype), random(12, 1, 2, 8, dtype=dtype)
    before = attention_op.attention(q, k, v, cu_seqlens=cu_seqlens)
    with torch.no_grad():
        k[:5] += 1
        v[:5] = float("nan")
    after = attention_op.attention(q, k, v, cu_seqlens=cu_seqlens)
    return [row for row in range(12) if not torch.equal(before[row], after[row])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_bit_of_a_document_reaches_another(dtype):
    assert changed_rows(torch.tensor([0, 5, 12]), dtype) == [0, 1, 2, 3, 4]
    # The same change is seen by every row when there is one document: the check above can fail.
    assert changed_rows(torch.tensor([0, 12]), dtype) == list(range(12))


def test_packed_attention_refuses_boundaries_that_do_not_fit():
    q, k = random(12, 1, 4, 8), random(12, 1, 2, 8)
    with pytest.raises(ValueError, match="ends at 11"):
        attention_op.attention(q, k, k, cu_seqlens=torch.tensor([0, 11]))
    with pytest.raises(ValueError, match="batch of 1"):
        attention_op.attention(random(12, 2, 4, 8), k, k, cu_seqlens=torch.tensor([0, 12]))
