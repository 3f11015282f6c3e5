"""A recomputed function may return a parameter beside its result, as an MLP does its bias."""

import inspect

import pytest
import torch

from mindspeed_llm import accelerator, patches
from mindspeed_llm.accelerator import torch_facade

NAME = "recomputed-biases-stay-parameters"


@pytest.fixture
def checkpoint():
    """megatron's checkpoint as its modules find it, patched."""
    from megatron.core import tensor_parallel
    from megatron.core.tensor_parallel import random

    torch_facade.install(accelerator.current())
    patches.apply()
    random.initialize_rng_tracker()
    assert tensor_parallel.checkpoint is random.checkpoint
    return random.checkpoint


def gradients(checkpoint, *, frozen_bias=False):
    """Of an MLP whose last bias is added by its caller: input's, weight's and bias's gradient; calls of the MLP."""
    torch.manual_seed(0)
    weight, bias = torch.nn.Parameter(torch.randn(4, 4)), torch.nn.Parameter(torch.randn(4), not frozen_bias)
    x, calls = torch.randn(3, 4, requires_grad=True), []

    def mlp(hidden):
        calls.append(1)
        if len(calls) > 5:
            raise RecursionError("the backward of the MLP recomputes the MLP again")
        return torch.tanh(hidden @ weight), bias

    output, added = mlp(x) if checkpoint is None else checkpoint(mlp, False, x)
    (output + added).square().sum().backward()
    assert bias.is_leaf
    return [x.grad, weight.grad, bias.grad], len(calls)


@pytest.mark.parametrize("frozen_bias", [False, True])
def test_recomputing_changes_no_gradient(checkpoint, frozen_bias):
    expected, _ = gradients(None, frozen_bias=frozen_bias)
    found, calls = gradients(checkpoint, frozen_bias=frozen_bias)
    assert calls == 2
    for left, right in zip(found, expected):
        assert (left is None and right is None) or left.equal(right)
    assert (found[2] is None) == frozen_bias


def test_results_without_a_bias_are_as_they_were(checkpoint):
    x = torch.randn(3, requires_grad=True)
    output, nothing = checkpoint(lambda hidden: (hidden * 2, None), False, x)
    output.sum().backward()
    assert nothing is None and x.grad.tolist() == [2.0, 2.0, 2.0]


def test_megatrons_own_recomputes_for_ever(checkpoint):
    with pytest.raises(RecursionError, match="recomputes the MLP again"):
        gradients(inspect.unwrap(checkpoint))
