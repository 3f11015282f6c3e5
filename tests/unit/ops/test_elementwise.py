"""What norms, rotary embedding, activations and losses promise beyond their formulas."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mindspeed_llm.ops import cross_entropy, norm, rotary, swiglu

torch.set_num_threads(1)


def random(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


# norms


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


def test_scores_depend_on_the_distance_alone():
    q, k = random(1, 1, 1, 8), random(1, 1, 1, 8, seed=3)

    def score(q_position, k_position):
        turned_q = rotary.apply_rotary(q, table(1, 4, positions=torch.tensor([[q_position]])))
        turned_k = rotary.apply_rotary(k, table(1, 4, positions=torch.tensor([[k_position]])))
        return float((turned_q * turned_k).sum())

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-9)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-3)


# swiglu


def test_the_gate_comes_first():
    gate, up = random(3, 8).chunk(2, dim=-1)
    swapped = torch.cat((up, gate), -1)
    assert not torch.allclose(swiglu.swiglu(swapped), swiglu.reference(torch.cat((gate, up), -1)))


# cross entropy


def labels_with_gaps(n, vocab):
    labels = torch.randint(0, vocab, (n,), generator=torch.Generator().manual_seed(3))
    labels[::3] = -100
    return labels


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


class LargestResult(TorchDispatchMode):
    """Values of the largest tensor that an operator made."""

    values = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        made = [tensor.numel() for tensor in tree_leaves(result) if isinstance(tensor, torch.Tensor)]
        self.values = max(self.values, *made, 0)
        return result


def test_all_logits_never_exist_at_once():
    tokens, vocab, chunk = 64, 50, 4
    hidden, weight, labels = random(tokens, 2), random(vocab, 2), labels_with_gaps(tokens, vocab)
    largest = {}
    for name, rows in (("chunked", chunk), ("reference", None)):
        with LargestResult() as seen:
            implementation = cross_entropy.reference if name == "reference" else cross_entropy.linear_cross_entropy_sum
            implementation(hidden, weight, labels, vocab_size=vocab, chunk_rows=rows).backward()
        largest[name] = seen.values
    assert largest["chunked"] <= chunk * vocab
    assert largest["reference"] >= int((labels >= 0).sum()) * vocab


class Products(TorchDispatchMode):
    """Rows of the first factor of every product of matrices."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
            self.rows.append(arguments[-2].shape[0])
        return function(*arguments, **(keywords or {}))


def products_of_loss(hidden, weight, labels):
    with Products() as seen:
        cross_entropy.linear_cross_entropy_sum(hidden, weight, labels, vocab_size=weight.shape[0])
    return seen.rows


def test_evaluation_computes_no_gradients():
    hidden, weight, labels = random(6, 8), random(19, 8), torch.arange(6)
    with torch.no_grad():
        assert products_of_loss(hidden, weight, labels) == [6]
    assert products_of_loss(hidden, weight, labels) == [6, 6, 19]  # the control: of the hidden states and of the head


def test_rows_of_a_chunk():
    wide, narrow = 2 * 128256, 2 * 8192
    assert cross_entropy.rows_of_chunk(wide, True, "cpu") == 512
    assert cross_entropy.rows_of_chunk(narrow, True, "cpu") == 2048
    assert cross_entropy.rows_of_chunk(wide, True, "cuda") == cross_entropy.rows_of_chunk(wide, False, "cpu") == 523


def test_a_frozen_head_on_a_cpu_takes_rows_that_its_logits_stay_in_the_cache_for(monkeypatch):
    monkeypatch.setattr(cross_entropy, "ENOUGH_ROWS", 4)
    monkeypatch.setattr(cross_entropy, "CACHED_BYTES", 5 * 19 * 8)
    hidden, weight, labels = random(12, 8), random(19, 8), torch.arange(12)
    assert products_of_loss(hidden, weight.detach(), labels) == [5, 5, 5, 5, 2, 2]
    assert products_of_loss(hidden, weight, labels) == [12, 12, 19]  # the control: sums of gradients are not cut
    whole, parts = (
        torch.autograd.grad(
            cross_entropy.linear_cross_entropy_sum(hidden, weight.detach(), labels, vocab_size=19, chunk_rows=rows),
            hidden,
        )[0]
        for rows in (12, None)
    )
    torch.testing.assert_close(parts, whole)


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
