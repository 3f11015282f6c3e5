"""Every implementation of every operator against its reference, forward and backward; none is left out."""

import importlib
import pkgutil

import pytest
import torch

from mindspeed_llm.ops import registry, row_blocks
from mindspeed_llm.ops.compiled.kernel import Kernel
from mindspeed_llm.testing import operators

torch.set_num_threads(1)

TABLES = [importlib.import_module(f"{operators.__name__}.{m.name}") for m in pkgutil.iter_modules(operators.__path__)]
CASES = [case for table in TABLES for case in table.CASES]
IMPLEMENTATIONS = {name: entries for table in TABLES for name, entries in table.IMPLEMENTATIONS.items()}
# Kernels that are compiled are tried as they are written; test_compiled.py compiles some.
RUNS = [(case, entry) for case in CASES for entry in operators.runnable(case.operator)]


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(Kernel, "__call__", lambda self, *tensors, **constants: self.function(*tensors, **constants))


@pytest.mark.parametrize("case, entry", RUNS, ids=[f"{case} ({entry.name})" for case, entry in RUNS])
def test_an_implementation_equals_the_reference(case, entry):
    operators.check(case, entry.function)


@pytest.mark.parametrize("case, entry", RUNS, ids=[f"{case} ({entry.name})" for case, entry in RUNS])
def test_rows_taken_in_small_blocks_give_the_same(case, entry, monkeypatch):
    monkeypatch.setattr(row_blocks, "BLOCK_BYTES", 128)
    operators.check(case, entry.function)


def test_no_operator_and_no_implementation_is_left_out_of_the_tables():
    registered = {name: {e.name for e in registry.implementations(name)} for name in registry.operators()}
    assert registered == {name: set(entries) for name, entries in IMPLEMENTATIONS.items()}
    assert {case.operator for case in CASES} == set(registered)
    assert all(registry.REFERENCE in names for names in registered.values())


def first_case(operator, differentiable=None):
    return next(c for c in CASES if c.operator == operator and differentiable in (None, c.differentiable))


class WrongGradient(torch.autograd.Function):
    """The identity, whose gradient is off by a thousandth."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.001


def distorted(function, distort):
    def call(*inputs):
        outputs = function(*inputs)
        if outputs is None:  # the first argument is written to
            inputs[0].copy_(distort(inputs[0]))
            return None
        if isinstance(outputs, torch.Tensor):
            return distort(outputs)
        return tuple(distort(o) for o in outputs)

    return call


def wrong_value(output):
    if output.dtype == torch.long:  # numbers of experts, which weights are looked up by
        return output
    return output + 1 if output.dtype == torch.uint8 else output * 1.001


@pytest.mark.parametrize("operator", sorted({c.operator for c in CASES if c.operator != "adamw"}))
def test_a_wrong_value_or_gradient_is_noticed(operator):
    case, function = first_case(operator), operators.runnable(operator)[0].function
    operators.check(case, function)
    with pytest.raises(AssertionError):
        operators.check(case, distorted(function, wrong_value))
    if case.differentiable:
        with pytest.raises(AssertionError):
            operators.check(case, distorted(function, WrongGradient.apply))


def test_a_wrong_step_of_adamw_is_noticed():
    case, function = first_case("adamw"), operators.runnable("adamw")[0].function

    def larger_epsilon(*lists):
        *lists, rates = lists
        function(*lists, rates._replace(eps=rates.eps * 10 + 1e-6))

    with pytest.raises(AssertionError):
        operators.check(case, larger_epsilon)
