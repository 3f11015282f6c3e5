"""Values of the kernels of adapters, interpreted on a CPU, against the formulas in fp64 on the same rounded inputs."""

from unittest import mock

import pytest
import torch
from triton.language import bfloat16, float32
from triton.runtime import interpreter

from mindspeed_llm.lora.function import LinearKind, adapted_linear
from mindspeed_llm.ops import registry
from mindspeed_llm.ops.adapter import CounterMask
from mindspeed_llm.ops.cuda import adapter_kernels
from mindspeed_llm.testing.operators import Draw, adapters

torch.set_num_threads(1)

# Largest error over the largest value: rounding of the result, and of sums over a few hundred numbers in fp32. The
# interpreter cuts bits off for bf16, where a device rounds to the nearest.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 2**-7}
OPERATORS = tuple(adapters.IMPLEMENTATIONS)
# m for each of two sequences, k, n, rank: one token, nothing a multiple of a tile, and wide ranks.
SIZES = [(1, 16, 16, 4), (35, 200, 130, 5), (17, 72, 64, 256)]


@pytest.fixture(autouse=True, scope="module")
def bf16_products():
    """The interpreter holds bf16 as bits of 16-bit integers, and would multiply those."""
    multiply = interpreter.InterpreterBuilder.create_dot

    def wide(builder, tensor):
        if tensor.dtype != bfloat16:
            return tensor
        return builder.cast_impl(tensor, float32)

    def create_dot(builder, a, b, *rest):
        return multiply(builder, wide(builder, a), wide(builder, b), *rest)

    with mock.patch.object(interpreter.InterpreterBuilder, "create_dot", create_dot):
        yield


def function(operator, name):
    return next(entry.function for entry in registry.implementations(operator) if entry.name == name)


def widened(inputs):
    return [i.double() if isinstance(i, torch.Tensor) else i for i in inputs]


def error(operator, inputs):
    """Of the kernel, relative to the largest value."""
    exact = adapters.call(function(operator, "reference"), *widened(inputs))
    found = adapters.call(function(operator, "triton"), *inputs)
    assert found.dtype == inputs[0].dtype and found.shape == exact.shape
    return float((found.double() - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_kernel_computes_the_formula(operator, dropout, dtype):
    for sizes in SIZES:
        inputs = adapters.sizes(operator, *sizes, dropout, bias=sizes[0] > 1)(Draw(sum(sizes), dtype))
        assert error(operator, inputs) <= TOLERANCE[dtype], sizes


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_wrong_factor_and_another_mask_are_noticed(operator):
    inputs = adapters.sizes(operator, 35, 72, 40, 4, 0.1)(Draw(0, torch.float32))
    masked = adapter_kernels._masked

    def off(mask, *rest):
        found, constants = masked(mask, *rest)
        return {**found, "factor": found["factor"] * 1.001}, constants

    def another(mask, *rest):
        return masked(CounterMask(mask.probability, mask.seed + 1), *rest)

    for wrong in (off, another):
        with mock.patch.object(adapter_kernels, "_masked", wrong):
            assert error(operator, inputs) > 10 * TOLERANCE[torch.float32]


def test_columns_between_others_are_read_where_they_are():
    whole = torch.randn(9, 2, 96)
    part = whole[..., 32:64]
    found = function("adapter_down", "triton")(part, torch.eye(32), None)
    assert torch.equal(found, part)
    grad = torch.randn(9, 2, 8)[..., ::2]
    found = function("adapter_down_gradient", "triton")(grad, part, None)
    torch.testing.assert_close(found, torch.einsum("sbr,sbk->rk", grad, part))


def test_columns_beside_a_total_are_left_alone():
    whole, narrow, b = torch.zeros(9, 64), torch.randn(9, 3), torch.randn(16, 3)
    found = function("adapter_up", "triton")(whole[:, 16:32], narrow, b, 2.0, None)
    torch.testing.assert_close(found, 2.0 * narrow @ b.t())
    assert not whole[:, :16].any() and not whole[:, 32:].any()


class Packed:
    """A frozen weight that is not held as a matrix."""

    def __init__(self, weight):
        self.weight = weight

    def materialize(self):
        return self.weight


@pytest.fixture
def selected():
    """select(name, ...) uses Triton for these operators of a CPU; forgotten afterwards."""

    def select(*operators):
        for operator in operators:
            registry._chosen[operator] = next(e for e in registry.implementations(operator) if e.name == "triton")

    yield select
    registry.reset()


def gradients(x, a, b, weight, bias, mask, scaling):
    """Output and gradients of x, A and B of a fused linear with the operators in use."""
    leaves = [tensor.clone().requires_grad_() for tensor in (x, a, b)]
    kind = LinearKind(True, False, None, 1, scaling)
    y = adapted_linear(leaves[0], mask, weight, bias, *leaves[1:], kind)
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.cos(y.detach().double()).to(y.dtype))]


def formula(x, a, b, weight, bias, mask, scaling):
    """The same by autograd, in fp64."""
    x, a, b, weight, bias = (None if t is None else t.double() for t in (x, a, b, weight, bias))
    leaves = [tensor.requires_grad_() for tensor in (x, a, b)]
    dropped = x if mask is None else mask.apply(x)
    y = torch.nn.functional.linear(x, weight, bias) + scaling * (dropped @ a.t()) @ b.t()
    return y, leaves


@pytest.mark.parametrize("operators", [OPERATORS[:3], OPERATORS], ids=["adapter", "base too"])
@pytest.mark.parametrize("dropout, bias, packed", [(0.0, True, False), (0.1, False, False), (0.1, True, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_linear_forward_and_backward(operators, dropout, bias, packed, dtype, selected):
    draw = Draw(7, dtype)
    x, a, b, weight = (draw(*size).detach() for size in ((5, 2, 48), (6, 48), (40, 6), (40, 48)))
    offset = draw(40).detach() if bias else None
    selected(*operators)
    mask, frozen = adapters.mask(dropout), Packed(weight) if packed else weight
    found = gradients(x, a, b, frozen, offset, mask, 2.0)
    y, leaves = formula(x, a, b, weight, offset, mask, 2.0)
    expected = [y.detach(), *torch.autograd.grad(y, leaves, torch.cos(found[0].double()).to(dtype).double())]
    # Narrow tensors are rounded to the type of the computation before they multiply again.
    limit = 2e-6 if dtype == torch.float32 else 2**-5
    for one, exact in zip(found, expected, strict=True):
        assert float((one.double() - exact).abs().max() / exact.abs().max()) < limit
    for one, exact in zip(gradients(x, a, b, frozen, offset, mask, 2.2), expected, strict=True):
        assert float((one.double() - exact).abs().max() / exact.abs().max()) > limit


def test_what_the_kernels_do_not_take_is_torchs():
    inputs = adapters.sizes("adapted_product", 3, 8, 6, 2, 0.1)(Draw(0, torch.float64))
    with mock.patch.object(adapter_kernels, "launch_adapted_product", side_effect=AssertionError):
        found = adapters.call(function("adapted_product", "triton"), *inputs)
    assert torch.equal(found, adapters.call(function("adapted_product", "torch"), *inputs))
