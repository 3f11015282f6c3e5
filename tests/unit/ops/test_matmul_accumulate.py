"""Weight gradients added inside the product: what is rounded, and what must not be touched."""

import torch

from mindspeed_llm.ops import matmul_accumulate as module
from mindspeed_llm.ops import row_blocks
from mindspeed_llm.ops.matmul_accumulate import add_widened, matmul_accumulate, reference

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


def test_a_narrow_part_is_added_by_rows_bit_for_bit(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    before, part = (torch.randn(10, 2, 6, generator=generator) for _ in range(2))
    part = part.bfloat16()
    whole = before.clone().add_(part)
    monkeypatch.setattr(module, "LEAST_BLOCKED", 1)
    monkeypatch.setattr(row_blocks, "BLOCK_BYTES", 3 * 12 * 4 // torch.get_num_threads())
    found = before.clone()
    add_widened(found, part)
    assert torch.equal(found, whole)
    monkeypatch.setattr(module, "row_blocks", lambda rows, width, like: [slice(0, 3), slice(3, 9)])
    add_widened(found := before.clone(), part)  # the control: rows are left out
    assert not torch.equal(found, whole)
