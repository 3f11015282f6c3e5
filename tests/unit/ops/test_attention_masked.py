"""Attention under a mask of any form: the formula, also for values of another width and queries that see nothing."""

import pytest
import torch

from mindspeed_llm.ops import registry
from mindspeed_llm.ops.attention import reference
from mindspeed_llm.ops.attention_masked import masked_attention, masked_scores, masked_sdpa


def inputs(s, s_k, b=2, n=4, g=2, d=8, e=6):
    generator = torch.Generator().manual_seed(s)
    shapes = ((s, b, n, d), (s_k, b, g, d), (s_k, b, g, e))
    tensors = [torch.randn(x, generator=generator, dtype=torch.float64).requires_grad_() for x in shapes]
    return tensors, torch.randn(s, b, n * e, generator=generator, dtype=torch.float64), generator


def with_gradients(function, tensors, grad):
    out = function(*tensors)
    return [out, *torch.autograd.grad(out, tensors, grad)]


@pytest.mark.parametrize("rows", [1, 2])
def test_both_forms_agree_whatever_is_hidden(rows):
    tensors, grad, generator = inputs(7, 9)
    hidden = torch.rand(rows, 1, 7, 9, generator=generator) < 0.5
    hidden[:, :, 3] = True
    fused, plain = (
        with_gradients(lambda q, k, v, run=run: run(q, k, v, hidden, 0.0, 0.4), tensors, grad)
        for run in (masked_sdpa, masked_scores)
    )
    for found, expected in zip(fused, plain):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    assert not fused[0][3].any() and not fused[1][3].any()  # sees nothing: no output, no gradient
    assert fused[0][2].all()


def test_a_causal_mask_is_causal_attention():
    tensors, grad, _ = inputs(12, 12)
    hidden = torch.ones(1, 1, 12, 12, dtype=torch.bool).triu(1)
    found = with_gradients(lambda q, k, v: masked_attention(q, k, v, hidden), tensors, grad)
    for one, other in zip(found, with_gradients(reference, tensors, grad)):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_the_reference_is_chosen_by_name():
    registry.select("masked_attention", registry.REFERENCE)
    assert registry.implementation("masked_attention") is masked_scores
    registry.reset()
    assert registry.implementation("masked_attention") is masked_sdpa


def test_masks_of_another_type_or_shape_are_refused():
    tensors, _, _ = inputs(4, 4)
    for wrong in (torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 5, dtype=torch.bool), torch.zeros(4, 4).bool()):
        with pytest.raises(ValueError, match=r"a mask must be bool \[2 or 1, 1, 4, 4\]"):
            masked_attention(*tensors, wrong)
