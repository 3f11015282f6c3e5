"""NF4 against codes and scales that bitsandbytes 0.50.2 made, and its own promises."""

import pytest
import torch

from mindspeed_llm.errors import UserError
from mindspeed_llm.ops.nf4 import NF4, Scales, dequantize_nf4, dynamic_codes, quantize_nf4
from mindspeed_llm.ops.nf4_matrix import join, quantize_matrix

torch.set_num_threads(1)


def numbers(count):
    """Deterministic, without a generator: what the stored codes were made of."""
    i = torch.arange(count, dtype=torch.float64)
    return ((i * 0.7548776662466927) % 1 - 0.5 + 0.1 * ((i * 0.5698402909980532) % 1)).float() * (1 + i // 64).float()


# From bitsandbytes.functional.quantize_4bit(numbers(320), blocksize=64, quant_type="nf4", compress_statistics=True).
PACKED_SUM, PACKED_FIRST = 1795678, [13, 132, 29, 149, 29, 164, 29, 165]
SCALE_CODES, SCALE, MEAN = [0, 35, 89, 225, 250], [1.0788581371307373], 1.660081148147583
VALUES = [
    -0.5888087749481201,
    -0.232530876994133,
    -0.10195866227149963,
    0.27559879422187805,
    0.9168235659599304,
    2.2913818359375,
    -0.9049067497253418,
    -0.49346843361854553,
]


def test_codes_scales_and_values_are_those_of_bitsandbytes():
    found = quantize_nf4(numbers(320))
    assert found.packed[:8].tolist() == PACKED_FIRST
    assert int((found.packed.long() * torch.arange(1, 161)).sum()) == PACKED_SUM
    assert found.scales.codes.tolist() == SCALE_CODES
    assert found.scales.scales.tolist() == SCALE and float(found.scales.mean) == MEAN
    assert dequantize_nf4(found)[::40].tolist() == VALUES


def test_values_of_the_table_survive():
    x = torch.tensor(NF4).repeat(8) * 3.0
    assert torch.equal(dequantize_nf4(quantize_nf4(x, double=False)), x)
    assert not torch.equal(dequantize_nf4(quantize_nf4(x + 0.01, double=False)), x + 0.01)


def test_the_error_is_at_most_half_a_step():
    x = torch.randn(513, 7, generator=torch.Generator().manual_seed(0))
    found = dequantize_nf4(quantize_nf4(x, double=False))
    largest_gap = float(torch.tensor(NF4).diff().max())
    scales = quantize_nf4(x, double=False).scales.repeat_interleave(64)[: x.numel()].view(x.shape)
    assert bool(((found - x).abs() <= scales * largest_gap / 2 + 1e-6).all()) and found.dtype == x.dtype


def test_double_quantisation_is_a_quarter_of_a_bit_cheaper_and_close():
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    double, single = quantize_nf4(x), quantize_nf4(x, double=False)
    assert isinstance(double.scales, Scales) and double.scales.codes.dtype == torch.uint8
    assert torch.equal(double.packed, single.packed) and dequantize_nf4(double).dtype == torch.bfloat16
    assert float((double.scales.values() / single.scales - 1).abs().max()) < 0.02


def test_the_nearest_value_is_found_on_both_sides_of_every_middle():
    table = torch.tensor(NF4)
    middles = (table[:-1] + table[1:]) / 2
    beside = [torch.nextafter(middles, torch.full_like(middles, end)) for end in (-9.0, 9.0)]
    # Scales of one: each block holds a 1 too.
    x = torch.cat([*beside, middles, table, torch.tensor([1.0, 0.0])])
    assert x.numel() <= 64
    packed = quantize_nf4(x, double=False).packed
    codes = torch.stack((packed >> 4, packed & 15), -1).view(-1)[: x.numel()].long()
    assert torch.equal(codes, torch.bucketize(x, middles))


def test_quantising_leaves_its_input_alone():
    x = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    quantize_nf4(x)
    quantize_matrix(x, 1, 0, 64)
    assert torch.equal(x, before)


def test_a_part_of_a_matrix_is_quantised_as_in_the_whole():
    x = torch.randn(70, 320, generator=torch.Generator().manual_seed(0))
    whole = quantize_matrix(x)
    dense = whole.dense(torch.float32)
    assert torch.equal(dense, dequantize_nf4(quantize_nf4(x)))
    for dim, start, stop in ((0, 3, 50), (1, 64, 256)):
        expected = dense[start:stop] if dim == 0 else dense[:, start:stop]
        assert torch.equal(quantize_matrix(x, dim, start, stop).dense(torch.float32), expected)
        assert torch.equal(whole.cut(dim, start, stop).dense(torch.float32), expected)
    assert not torch.equal(quantize_matrix(x[3:50] * 1.0).dense(torch.float32), dense[3:50])


def test_rows_of_several_matrices_keep_their_numbers():
    x, y = (torch.randn(rows, 128, generator=torch.Generator().manual_seed(rows)) * rows for rows in (300, 9))
    order = torch.randperm(309, generator=torch.Generator().manual_seed(0))
    parts = quantize_matrix(x), quantize_matrix(y)
    joined = join(parts, order)
    assert torch.equal(joined.dense(torch.float32), torch.cat([p.dense(torch.float32) for p in parts])[order])
    assert joined.num_bytes < 0.6 * x.numel() and not torch.equal(joined.first_block, join(parts).first_block)


@pytest.mark.parametrize("columns, start", [(100, 0), (128, 32)])
def test_blocks_are_not_cut(columns, start):
    with pytest.raises(UserError, match="legal: multiples of 64"):
        quantize_matrix(torch.ones(2, columns), 1, start, columns)


def test_the_dynamic_type_has_256_different_values():
    codes = dynamic_codes()
    assert codes.numel() == 256 and bool((codes.diff() > 0).all()) and float(codes[-1]) == 1.0


@pytest.mark.parametrize("block_size", [0, 3, -2])
def test_blocks_are_of_even_size(block_size):
    with pytest.raises(ValueError, match="legal: even"):
        quantize_nf4(torch.ones(4), block_size)
