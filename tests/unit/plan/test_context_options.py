"""Options of context parallelism: what they make of a plan, and what is refused or without effect."""

import pytest

from mindspeed_llm.config.parser import parse
from mindspeed_llm.errors import UserError
from mindspeed_llm.parallel.context_split import SequenceSplit
from mindspeed_llm.plan.plan import resolve


@pytest.fixture
def plan(toy_llama, monkeypatch):
    """plan("--flag value") of fine-tuning the toy (8 heads) on 8 processes."""
    monkeypatch.setenv("WORLD_SIZE", "8")

    def make(words, door="posttrain"):
        parsed = parse(door, f"--load {toy_llama} --train-iters 1 --global-batch-size 8 {words}".split())
        return resolve(parsed.config, parsed.problems)

    return make


@pytest.mark.parametrize("words, split, window", [
    ("", SequenceSplit(4, 1), 1),
    ("--context-parallel-algo megatron_cp_algo --cp-window-size 2", SequenceSplit(4, 1), 2),
    ("--context-parallel-algo ulysses_cp_algo", SequenceSplit(4, 4), 1),
    ("--context-parallel-algo hybrid_cp_algo --ulysses-degree-in-cp 2 --cp-window-size 2", SequenceSplit(4, 2), 2),
])  # fmt: skip
def test_algorithms(plan, words, split, window):
    layout = plan(f"--context-parallel-size 4 {words}").layout
    assert (layout.sequence_split, layout.ring_window, layout.dp) == (split, window, 2)


@pytest.mark.parametrize("words, said", [
    ("--context-parallel-algo hybrid_cp_algo", "--ulysses-degree-in-cp is missing"),
    ("--ulysses-degree-in-cp 2", "has a meaning with --context-parallel-algo hybrid_cp_algo only"),
    ("--context-parallel-algo ulysses_cp_algo --cp-window-size 2", "there is no ring"),
    ("--context-parallel-algo hybrid_cp_algo --ulysses-degree-in-cp 3", "legal: 1, 2, 4 ranks"),
    ("--context-parallel-algo ulysses_cp_algo --tensor-model-parallel-size 4", "world size 8 %"),
    ("--cp-window-size 3", "ring of 4 % inner ring of 3 = 0 does not hold; legal: 1, 2, 4 for --cp-window-size"),
    ("--attention-dropout 0.1", "attention_dropout 0.1 = 0 does not hold; legal: --attention-dropout 0"),
    ("--context-parallel-algo kvallgather_cp_algo", "legal: megatron_cp_algo, ulysses_cp_algo, hybrid_cp_algo"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused(plan, words, said):
    with pytest.raises(UserError) as refused:
        plan(f"--context-parallel-size 4 {words}")
    assert said in str(refused.value)


def test_options_of_an_algorithm_have_no_effect_without_context_parallelism(plan):
    resolved = plan("--context-parallel-algo ulysses_cp_algo")
    assert resolved.layout.sequence_split == SequenceSplit()
    assert any(note.startswith("--context-parallel-algo has no effect") for note in resolved.notes)


def test_inference_has_no_context_parallelism(plan):
    with pytest.raises(UserError, match="--context-parallel-size"):
        plan("--context-parallel-size 2", door="inference")
