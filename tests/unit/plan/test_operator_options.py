"""Options of operators that overlap communication: what they make of a plan, and what is refused."""

import pytest

from mindspeed_llm.config.parser import parse
from mindspeed_llm.errors import UserError
from mindspeed_llm.plan.plan import resolve
from mindspeed_llm.training.build_options import build_options

SEQUENCE = "--tensor-model-parallel-size 2 --sequence-parallel"


@pytest.fixture
def plan(toy_llama, monkeypatch):
    """plan("--flag value") of pre-training the toy on 2 processes."""
    monkeypatch.setenv("WORLD_SIZE", "2")

    def make(words):
        given = f"--load {toy_llama} --data-path x --train-iters 1 --global-batch-size 2 --seq-length 64 {words}"
        parsed = parse("pretrain", given.split())
        return resolve(parsed.config, parsed.problems)

    return make


@pytest.mark.parametrize("words, chunks", [
    (SEQUENCE, None),
    (f"{SEQUENCE} --use-ascend-coc", 1),
    (f"{SEQUENCE} --use-ascend-coc --coc-parallel-num 8", 8),
])  # fmt: skip
def test_chunks_reach_the_linears(plan, words, chunks):
    assert build_options(plan(words), initialize=False).communication_chunks == chunks


def test_weight_gradients_are_added_in_the_product_on_any_device(plan):
    assert not build_options(plan(""), initialize=False).gradient_accumulation_fusion
    assert build_options(plan("--gradient-accumulation-fusion"), initialize=False).gradient_accumulation_fusion


@pytest.mark.parametrize("words, said", [
    ("--use-ascend-coc", "--use-ascend-coc needs --sequence-parallel and --tensor-model-parallel-size of at least 2"),
    (f"{SEQUENCE} --coc-parallel-num 2", "--coc-parallel-num has a meaning with --use-ascend-coc only"),
    (f"{SEQUENCE} --use-ascend-coc --coc-parallel-num 3", "legal: 1, 2, 4, 8"),
    (f"{SEQUENCE} --use-ascend-coc --coc-parallel-num 4 --seq-length 60", "legal: 56, 64 for --seq-length"),
    (f"{SEQUENCE} --use-ascend-mc2", "--use-ascend-mc2 needs an Ascend NPU, and the device is cpu"),
    (f"{SEQUENCE} --use-ascend-mc2 --use-ascend-coc", "--use-ascend-coc and --use-ascend-mc2 exclude each other"),
    (f"{SEQUENCE} --coc-fused-kernel", "use --use-ascend-mc2 on an NPU"),
])  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(plan, words, said):
    with pytest.raises(UserError) as refused:
        plan(words)
    (line,) = [line for line in str(refused.value).splitlines() if said in line]
    assert line
