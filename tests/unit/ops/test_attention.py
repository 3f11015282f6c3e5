"""Attention against its formula, forward and backward, in fp64; and documents never mix."""

import pytest
import torch

from mindspeed_llm.ops import attention as attention_op
from mindspeed_llm.ops import registry

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


# soft caps, sinks, dropout, layouts


def some(s=7, s_k=None, n=4, g=2, d=8, e=8, b=2):
    return random(s, b, n, d), random(s_k or s, b, g, d, seed=1), random(s_k or s, b, g, e, seed=2)


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("sizes", [dict(s=1), dict(s=70), dict(s=3, s_k=9), dict(s=5, n=2, g=2, d=192, e=128)])
def test_capped_scores_and_sinks(softcap, with_sinks, sizes):
    inputs = (*some(**sizes), *([random(sizes.get("n", 4), seed=3)] if with_sinks else []))
    options = dict(window_size=4, softcap=softcap)
    assert_same(
        lambda q, k, v, z=None: attention_op.attention(q, k, v, sinks=z, **options),
        lambda q, k, v, z=None: attention_op.reference(q, k, v, sinks=z, **options),
        inputs,
    )


def test_a_sink_takes_weight_and_a_cap_bounds_scores():
    q, k, _ = some()
    ones = torch.ones_like(k)
    weights = attention_op.attention(q, k, ones, sinks=torch.zeros(4, dtype=torch.float64))
    assert bool((weights < 1).all()) and torch.allclose(attention_op.attention(q, k, ones), torch.ones_like(weights))
    # Scores within 1e-6 of each other: all weights alike.
    evenly = attention_op.attention(q, k, k, softcap=1e-6)
    torch.testing.assert_close(evenly[-1], k.mean(0).repeat_interleave(2, dim=1).flatten(1), rtol=1e-4, atol=1e-5)


def test_packed_documents_with_sinks_and_caps():
    inputs = random(12, 1, 4, 8), random(12, 1, 2, 8, seed=1), random(12, 1, 2, 8, seed=2), random(4, seed=3)
    options = dict(cu_seqlens=torch.tensor([0, 5, 5, 12]), softcap=1.5)
    assert_same(
        lambda q, k, v, z: attention_op.attention(q, k, v, sinks=z, **options),
        lambda q, k, v, z: attention_op.reference(q, k, v, sinks=z, **options),
        inputs,
    )


LAYOUTS = {
    "BSND": lambda x: x.transpose(0, 1),
    "BNSD": lambda x: x.permute(1, 2, 0, 3),
    "SBH": lambda x: x.flatten(2),
    "BSH": lambda x: x.flatten(2).transpose(0, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_views_of_one(layout):
    q, k, v = some(e=5)
    expected = attention_op.attention(q, k, v)
    found = attention_op.attention(*map(LAYOUTS[layout], (q, k, v)), layout=layout, num_heads=(4, 2))
    out = {"BNSD": expected.unflatten(2, (4, 5)).permute(1, 2, 0, 3), "SBH": expected}.get(layout)
    assert torch.equal(found, expected.transpose(0, 1) if out is None else out)


def test_documents_without_a_batch_dimension():
    q, k, v = some(b=1)
    bounds = torch.tensor([0, 3, 7])
    found = attention_op.attention(q[:, 0], k[:, 0], v[:, 0], cu_seqlens=bounds, layout="TND")
    assert torch.equal(found, attention_op.attention(q, k, v, cu_seqlens=bounds)[:, 0])


@pytest.mark.parametrize("layout, message", [("SBHD", "legal: SBND"), ("BSH", "needs num_heads")])
def test_other_layouts_are_refused(layout, message):
    with pytest.raises(ValueError, match=message):
        attention_op.attention(*some(), layout=layout)


@pytest.mark.parametrize("extra", [{}, dict(softcap=2.0), dict(window_size=3)])
def test_dropped_weights_are_the_same_backwards(extra):
    """With values one-hot by position the output is the dropped weights themselves; so is the values' gradient."""
    q, k, _ = some(n=2, g=2, b=1, d=7)
    v = torch.eye(7, dtype=torch.float64)[:, None, None].expand(7, 1, 2, 7).clone().requires_grad_()
    torch.manual_seed(0)
    weights = attention_op.attention(q, k, v, dropout=0.5, **extra).unflatten(2, (2, 7))
    assert 5 < int((weights == 0).sum()) - 2 * 21 < 2 * 28  # some are dropped beside those that causality hides
    (grad,) = torch.autograd.grad(weights, v, torch.eye(7, dtype=torch.float64)[:, None, None].expand(7, 1, 2, 7))
    torch.testing.assert_close(grad, weights.detach().permute(3, 1, 2, 0))


def test_who_cannot_do_all_is_passed_over():
    from mindspeed_llm.ops.attention_rows import row_attention

    entries = {entry.name for entry in registry.implementations("attention")}
    assert entries == set(attention_op.ABILITIES)
    registry.reset()
    assert attention_op.able(0.0) is registry.implementation("attention")
    assert attention_op.able(0.0, ["sinks"]) is row_attention
    assert attention_op.able(0.5, ["sinks"]) is attention_op.all_scores
    registry.select("attention", registry.REFERENCE)
    assert attention_op.able(0.0, ["softcap"]) is attention_op.all_scores
    registry.reset()
    with pytest.raises(ValueError, match="no dropout"):
        row_attention(*some(), None, 0.5, None)
