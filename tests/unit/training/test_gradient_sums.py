"""Gradients added to their sums by rows: the training is the same to the last bit."""

import pytest

from mindspeed_llm.ops import matmul_accumulate
from mindspeed_llm.training import setup

FLAGS = "--seq-length 64 --lr 1e-2 --global-batch-size 4 --micro-batch-size 2 --train-iters 3 --eval-iters 0 --bf16"


def history(door, toy, corpus, more=""):
    result = door("pretrain", FLAGS, f"--load {toy} --data-path {corpus} {more}")
    return [loss for _, loss in result.history.train]


@pytest.fixture
def as_megatron(door, toy_llama, corpus, monkeypatch):
    """Losses with megatron-core's own sums."""
    with monkeypatch.context() as own:
        own.setattr(setup, "add_gradients_by_rows", lambda parameters: None)
        return history(door, toy_llama, corpus)


def test_losses_are_those_of_megatrons_own_sums(door, toy_llama, corpus, as_megatron, monkeypatch):
    monkeypatch.setattr(matmul_accumulate, "LEAST_BLOCKED", 1)
    assert history(door, toy_llama, corpus) == as_megatron
    # the control: what is marked and not added is missing
    monkeypatch.setattr(matmul_accumulate, "add_widened", lambda total, part: total.add_(part[:1]))
    assert history(door, toy_llama, corpus) != as_megatron
