"""Every operator against its formula, forward and backward, in fp64; and what must never mix does not."""

import pytest
import torch

from mindspeed_llm.ops import attention as attention_op
from mindspeed_llm.ops import cross_entropy, norm, rotary, swiglu

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


# attention


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


# norms


@pytest.mark.parametrize("shape", [(5, 3, 16), (2, 3, 4, 16)])
@pytest.mark.parametrize("name", ["two_pass_rms_norm", "torch_rms_norm"])
def test_rms_norm_equals_the_formula(shape, name):
    function = getattr(norm, name)
    assert_same(
        lambda x, w: function(x, w, 1e-5),
        lambda x, w: norm.rms_norm_reference(x, w, 1e-5),
        (random(*shape), random(16)),
    )


def test_rms_norm_of_bf16_is_as_good_as_rounding_allows():
    x, w = random(64, 256, dtype=torch.bfloat16), random(256, dtype=torch.bfloat16)
    exact_x, exact_w = (t.detach().double().requires_grad_() for t in (x, w))
    found, exact = norm.rms_norm(x, w, 1e-5), norm.rms_norm_reference(exact_x, exact_w, 1e-5)
    grad = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    found.backward(grad)
    exact.backward(grad.double())
    assert found.dtype == torch.bfloat16
    for one, other in ((found, exact), (x.grad, exact_x.grad), (w.grad, exact_w.grad)):
        assert float((one.double() - other).abs().max() / other.abs().max()) < 2**-7


def test_rms_norm_epsilon_matters():
    x, w = random(4, 16), random(16)
    assert not torch.allclose(norm.rms_norm(x, w, 1e-5), norm.rms_norm_reference(x, w, 1e-1))


# rotary


def table(length, half, dtype=torch.float64, positions=None):
    positions = torch.arange(length)[None] if positions is None else positions
    inv_freq = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    return rotary.rotary_table(positions, inv_freq, 1.0, dtype)


@pytest.mark.parametrize("rotated", [4, 8])
def test_rotation_equals_the_formula(rotated):
    angles = table(7, rotated // 2)
    assert_same(
        lambda x: rotary.apply_rotary(x, angles),
        lambda x: rotary.apply_rotary_reference(x, angles),
        (random(7, 2, 3, 8),),
    )


@pytest.mark.parametrize("with_table", [True, False])
def test_splitting_and_rotating_together_equals_one_after_the_other(with_table):
    groups, queries, d = 2, 3, 8
    angles = table(5, d // 2) if with_table else None

    def formula(qkv):
        parts = qkv.view(5, 2, groups, queries + 2, d)
        q, k, v = parts[..., :queries, :].reshape(5, 2, -1, d), parts[..., -2, :], parts[..., -1, :]
        if with_table:
            q, k = rotary.apply_rotary_reference(q, angles), rotary.apply_rotary_reference(k, angles)
        return torch.cat((q, k, v), dim=2)

    assert_same(
        lambda qkv: torch.cat(rotary.split_qkv_rotary(qkv, groups, d, angles), dim=2),
        formula,
        (random(5, 2, groups * (queries + 2) * d),),
    )


def test_scores_depend_on_the_distance_alone():
    q, k = random(1, 1, 1, 8), random(1, 1, 1, 8, seed=3)

    def score(q_position, k_position):
        turned_q = rotary.apply_rotary(q, table(1, 4, positions=torch.tensor([[q_position]])))
        turned_k = rotary.apply_rotary(k, table(1, 4, positions=torch.tensor([[k_position]])))
        return float((turned_q * turned_k).sum())

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-9)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-3)


# swiglu


def test_swiglu_equals_the_formula():
    assert_same(swiglu.swiglu, swiglu.reference, (random(5, 2, 12),))
    gate, up = random(3, 8).chunk(2, dim=-1)
    swapped = torch.cat((up, gate), -1)
    assert not torch.allclose(swiglu.swiglu(swapped), swiglu.reference(torch.cat((gate, up), -1)))


# cross entropy


def labels_with_gaps(n, vocab):
    labels = torch.randint(0, vocab, (n,), generator=torch.Generator().manual_seed(3))
    labels[::3] = -100
    return labels


@pytest.mark.parametrize("chunk_rows", [1, 4, None])
@pytest.mark.parametrize("ignored", [False, True])
def test_cross_entropy_equals_the_formula_in_any_chunks(chunk_rows, ignored):
    labels = labels_with_gaps(11, 19) if ignored else torch.arange(11)
    assert_same(
        lambda h, w: cross_entropy.linear_cross_entropy_sum(h, w, labels, vocab_size=19, chunk_rows=chunk_rows),
        lambda h, w: cross_entropy.reference(h, w, labels, 19),
        (random(11, 8), random(24, 8)),  # 24 rows: five of padding
    )


def test_padded_rows_take_no_part_and_get_no_gradient():
    hidden, weight, labels = random(6, 8), random(24, 8), torch.arange(6)
    loss = cross_entropy.linear_cross_entropy_sum(hidden, weight, labels, vocab_size=19)
    loss.backward()
    assert not weight.grad[19:].any() and weight.grad[:19].all()
    with_padding = cross_entropy.reference(hidden, weight, labels, 24)
    assert not torch.allclose(loss, with_padding)


def test_no_labels_give_zero_loss_and_zero_gradients():
    hidden, weight = random(6, 8), random(19, 8)
    loss = cross_entropy.linear_cross_entropy_sum(hidden, weight, torch.full((6,), -100), vocab_size=19)
    loss.backward()
    assert float(loss) == 0.0 and not hidden.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("label", [19, 23, -1])
def test_a_label_outside_the_vocabulary_is_refused(label):
    with pytest.raises(ValueError, match="labels must be in"):
        cross_entropy.linear_cross_entropy_sum(random(1, 8), random(24, 8), torch.tensor([label]), vocab_size=19)


def test_frozen_head_and_evaluation():
    hidden, weight, labels = random(6, 8), random(19, 8), labels_with_gaps(6, 19)
    expected = torch.autograd.grad(cross_entropy.reference(hidden, weight, labels, 19), hidden)[0]
    frozen = weight.detach()
    loss = cross_entropy.linear_cross_entropy_sum(hidden, frozen, labels, vocab_size=19)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], expected)
    with torch.no_grad():
        assert not cross_entropy.linear_cross_entropy_sum(hidden, weight, labels, vocab_size=19).requires_grad


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precision_loss_is_fp32_and_small_gradients_survive_a_loss_scale(dtype, tolerance):
    hidden, weight = random(40, 16, dtype=dtype), random(50, 16, dtype=dtype)
    labels = labels_with_gaps(40, 50)
    exact_hidden, exact_weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    exact = cross_entropy.reference(exact_hidden, exact_weight, labels, 50)
    scale = 2.0**8
    (exact * scale).backward()
    loss = cross_entropy.linear_cross_entropy_sum(hidden, weight, labels, vocab_size=50, chunk_rows=16)
    (loss * scale).backward()
    assert loss.dtype == torch.float32 and float(loss) == pytest.approx(float(exact), rel=tolerance)
    for one, other in ((hidden.grad, exact_hidden.grad), (weight.grad, exact_weight.grad)):
        assert float((one.double() - other).abs().max() / other.abs().max()) < tolerance


def test_fp16_gradients_below_the_smallest_number_are_kept_by_the_scale():
    # A confident prediction: the gradient, about 1e-9, is below fp16's 6e-8 unless it is scaled before rounding.
    hidden = torch.tensor([[20.0, 0.0]], dtype=torch.float16, requires_grad=True)
    weight = torch.tensor([[1.0, 1.0], [0.0, -1.0]], dtype=torch.float16)
    loss = cross_entropy.linear_cross_entropy_sum(hidden, weight, torch.tensor([0]), vocab_size=2)
    (loss * 2.0**16).backward()
    assert hidden.grad.abs().max() > 0
