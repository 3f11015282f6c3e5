"""Weight gradients added inside the product: what is rounded, and what must not be touched."""

import torch

from mindspeed_llm.ops.matmul_accumulate import matmul_accumulate, reference

torch.set_num_threads(1)


def test_half_precision_products_are_added_to_a_wide_sum():
    generator = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(3, 20, n, generator=generator).bfloat16() for n in (6, 8))
    total = torch.full((8, 6), 1000.0)
    matmul_accumulate(total, grad, x)
    exact = torch.full((8, 6), 1000.0, dtype=torch.float64)
    reference(exact, grad.flatten(0, 1), x.flatten(0, 1))
    assert total.dtype == torch.float32
    assert float((total.double() - exact).abs().max()) < 2**-7 * float((exact - 1000).abs().max())
    assert float((total.bfloat16().double() - exact).abs().max()) > 0.1  # a sum in bf16 would have lost it
