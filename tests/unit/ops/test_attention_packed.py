"""Packed documents in batches of about one length equal the formula, and do not depend on each other."""

import dataclasses

import pytest
import torch

from mindspeed_llm.ops import attention_packed, registry
from mindspeed_llm.ops.attention import attention, reference
from mindspeed_llm.ops.attention_packed import LONGEST_FILLED, arrange, by_length, filled_length

torch.set_num_threads(1)

LENGTHS = (70, 3, 80, 16, 1, 129, 17)


def inputs(t, dtype=torch.float64):
    generator = torch.Generator().manual_seed(t)
    shapes = ((t, 1, 4, 8), (t, 1, 2, 8), (t, 1, 2, 8))
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    grad = torch.randn(t, 1, 32, generator=generator, dtype=torch.float64).to(dtype)
    return [x.requires_grad_() for x in tensors], grad


def bounds(lengths):
    return torch.tensor((0, *lengths)).cumsum(0)


def packed(tensors, grad, lengths):
    out = attention(*tensors, cu_seqlens=bounds(lengths))
    return [out, *torch.autograd.grad(out, tensors, grad)]


def part(tensors, grad, start, stop):
    return [x[start:stop].detach().requires_grad_() for x in tensors], grad[start:stop]


def equals_the_formula(tensors, grad, lengths):
    exact = reference(*tensors, cu_seqlens=bounds(lengths))
    exact = [exact, *torch.autograd.grad(exact, tensors, grad)]
    return all(torch.allclose(f, e, rtol=1e-12, atol=1e-12) for f, e in zip(packed(tensors, grad, lengths), exact))


def test_batches_equal_the_formula():
    assert registry.implementation("packed_attention") is by_length
    assert equals_the_formula(*inputs(sum(LENGTHS)), LENGTHS)


def test_a_gradient_that_arrives_for_copies_is_noticed(monkeypatch):
    tensors, grad = inputs(sum(LENGTHS))
    batches = dataclasses.replace(arrange(LENGTHS), filling=torch.empty(0, dtype=torch.long))
    monkeypatch.setattr(attention_packed, "arrange", lambda lengths: batches)
    assert not equals_the_formula(tensors, grad, LENGTHS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_documents_do_not_see_each_other_and_do_not_depend_on_their_neighbours(dtype):
    tensors, grad = inputs(sum(LENGTHS), dtype)
    whole = packed(tensors, grad, LENGTHS)
    alone = packed(*part(tensors, grad, 0, LENGTHS[0]), LENGTHS[:1])
    assert all(torch.equal(p[: LENGTHS[0]], a) for p, a in zip(whole, alone))
    spoilt = [torch.cat((x[: LENGTHS[0]], torch.full_like(x[LENGTHS[0] :], float("nan")))) for x in (*tensors, grad)]
    *spoilt, spoilt_grad = (x.detach() for x in spoilt)
    found = packed([x.requires_grad_() for x in spoilt], spoilt_grad, LENGTHS)
    assert all(torch.equal(f[: LENGTHS[0]], a) for f, a in zip(found, alone))


def test_a_document_of_the_length_of_its_batch_is_computed_as_it_stands():
    """As without packing: bit by bit, since nothing is arranged."""
    tensors, grad = inputs(48, torch.float32)
    assert torch.equal(packed(tensors, grad, (48,))[0], attention(*tensors))


def test_short_documents_are_filled_up_a_little_and_long_ones_not_at_all():
    for length in (1, 16, 17, 100, 128, 129, LONGEST_FILLED):
        assert length <= filled_length(length) <= max(length + length // 4, -(-length // 16) * 16)
        assert filled_length(filled_length(length)) == filled_length(length)
    assert filled_length(LONGEST_FILLED + 1) == LONGEST_FILLED + 1


def test_rows_are_arranged_and_put_back():
    batches = arrange(LENGTHS)
    t = sum(LENGTHS)
    assert torch.equal(batches.order[batches.back], torch.arange(t))
    assert len(batches.order) == sum(s * b for s, b in batches.sizes) == t + len(batches.filling)
    assert len(batches.sizes) < len(LENGTHS)


def test_a_row_without_documents_is_empty():
    tensors, _ = inputs(0)
    assert attention(*tensors, cu_seqlens=bounds((0,))).shape == (0, 1, 32)


def test_bounds_are_read_once_for_all_layers_and_again_when_they_change(monkeypatch):
    read, tolist = [], torch.Tensor.tolist
    ends = bounds(LENGTHS)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: (read.append(x) if x is ends else None) or tolist(x))
    tensors, _ = inputs(sum(LENGTHS))
    first = attention(*tensors, cu_seqlens=ends)
    assert torch.equal(attention(*tensors, cu_seqlens=ends), first) and len(read) == 1
    ends[1] -= 5
    changed = attention(*tensors, cu_seqlens=ends)
    assert len(read) == 2 and not torch.equal(changed, first)
    torch.testing.assert_close(changed, reference(*tensors, cu_seqlens=ends))
    with torch.inference_mode():
        ends = bounds(LENGTHS)
        torch.testing.assert_close(attention(*tensors, cu_seqlens=ends), first)
        ends[1] -= 5
        torch.testing.assert_close(attention(*tensors, cu_seqlens=ends), changed)
