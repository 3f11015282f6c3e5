"""Parts of attention, merged, are the whole; so are the gradients that each part finds from the merged result."""

import pytest
import torch

from mindspeed_llm.ops.attention import attention, reference
from mindspeed_llm.ops.attention_part import attention_part, attention_part_backward, merge_part

SCALE = 0.3


def inputs(s, s_k, b=2, n=6, g=2, d=8, e=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(s_k)
    shapes = ((s, b, n, d), (s_k, b, g, d), (s_k, b, g, e), (s, b, n, e))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def cuts(s, s_k, window):
    """Rectangles (rows, columns, shift) over two runs of keys, as context parallelism makes them."""
    half = s_k // 2
    for first, last in ((0, half), (half, s_k)):
        start = max(0, first - (s_k - s))
        stop = s if window is None else min(s, last + window - 1 - (s_k - s))
        if start < stop:
            yield slice(start, stop), slice(first, last), start + s_k - s - first


def in_parts(q, k, v, grad, window):
    """Output and gradients of attention to keys in two parts."""
    wide = torch.promote_types(q.dtype, torch.float32)
    out, lse = torch.zeros(grad.shape, dtype=wide), torch.full(grad.shape[:3], float("-inf"), dtype=wide)
    sizes = {"window_size": window, "scale": SCALE}
    for rows, columns, shift in cuts(q.shape[0], k.shape[0], window):
        merge_part(out[rows], lse[rows], *attention_part(q[rows], k[columns], v[columns], shift=shift, **sizes))
    gradients = [torch.zeros(x.shape, dtype=wide) for x in (q, k, v)]
    for rows, columns, shift in cuts(q.shape[0], k.shape[0], window):
        found = attention_part_backward(
            grad[rows], q[rows], k[columns], v[columns], out[rows], lse[rows], shift=shift, **sizes
        )
        for total, part, where in zip(gradients, found, (rows, columns, columns)):
            total[where] += part
    return [out, *gradients]


def whole(q, k, v, grad, window):
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out = reference(q, k, v, window_size=window, scale=SCALE)
    return [out.view(grad.shape), *torch.autograd.grad(out, (q, k, v), grad.flatten(2))]


@pytest.mark.parametrize("window", [None, 1, 9, 70])
@pytest.mark.parametrize("s, s_k", [(1, 2), (6, 10), (130, 130), (70, 200)])
def test_merged_parts_are_the_whole(s, s_k, window):
    tensors = inputs(s, s_k)
    for found, expected in zip(in_parts(*tensors, window), whole(*tensors, window)):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("n, g, e", [(4, 4, 5), (4, 1, 12)])
def test_values_may_have_another_width(n, g, e):
    tensors = inputs(20, 20, n=n, g=g, e=e)
    expected = whole(*tensors, None)
    for found, exact in zip(in_parts(*tensors, None), expected):
        torch.testing.assert_close(found, exact, rtol=1e-11, atol=1e-11)
    q, k, v, _ = tensors
    torch.testing.assert_close(attention(q, k, v, scale=SCALE), expected[0].flatten(2), rtol=1e-11, atol=1e-11)


def test_half_precision_is_merged_in_fp32():
    tensors = inputs(40, 40, dtype=torch.bfloat16)
    exact = whole(*(x.double() for x in tensors), None)
    found = in_parts(*tensors, None)
    assert all(x.dtype == torch.float32 for x in found)
    assert max(float((f - e).norm() / e.norm()) for f, e in zip(found, exact)) < 1e-6


def test_forgetting_to_rescale_would_be_noticed():
    q, k, v, grad = inputs(10, 10)
    first, second = (slice(0, 5), slice(5, 10))
    parts = [
        attention_part(q[5:], k[c], v[c], shift=s, window_size=None, scale=SCALE) for c, s in ((first, 5), (second, 0))
    ]
    added = parts[0][0] + parts[1][0]
    assert (added - whole(q, k, v, grad, None)[0][5:]).abs().max() > 0.1
