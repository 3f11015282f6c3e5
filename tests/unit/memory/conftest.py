"""What tests of memory options share."""

import pytest

from mindspeed_llm.config.parser import parse
from mindspeed_llm.ops import registry
from mindspeed_llm.plan.plan import resolve


@pytest.fixture
def plan(toy_llama):
    """plan("--flag value") of pre-training the toy."""

    def make(words):
        given = f"--load {toy_llama} --data-path x --train-iters 1 --global-batch-size 2 {words}"
        parsed = parse("pretrain", given.split())
        return resolve(parsed.config, parsed.problems)

    return make


@pytest.fixture(autouse=True)
def operators():
    """The best implementations, whatever a run before has chosen."""
    registry.reset()
