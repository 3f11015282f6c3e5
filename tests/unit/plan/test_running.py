"""What a run would refuse once it runs is refused with the plan, before any process group: also by `--dry-run`."""

import pytest

from mindspeed_llm.config.parser import parse
from mindspeed_llm.errors import UserError
from mindspeed_llm.plan.plan import resolve

# door, words, what is said, and words with which all is well
REFUSED = {
    "end of the decay": (
        "pretrain", "--train-iters 2 --min-lr 2e-4",
        "--min-lr: 0.0002 is above the default --lr 0.0001; give --lr", "--lr 1e-3",
    ),
    "end of the decay of full tuning": (
        "posttrain", "--train-iters 2 --min-lr 2e-5",
        "--min-lr: 2e-05 is above the default --lr 1e-05; give --lr", "--lora-r 4",
    ),
    "samples": (
        "pretrain", "--train-samples 3 --micro-batch-size 2",
        "--train-samples: 3 is less than one global batch of 4; legal: 4 or more", "--global-batch-size 2",
    ),
    "traced ranks": (
        "pretrain", "--train-iters 2 --profile --profile-ranks 0 2",
        "--profile-ranks: 2 is wrong, because the run has 2 ranks; legal: 0 to 1, or -1 for all", None,
    ),
    "packed rows": (
        "posttrain", "--train-iters 2 --no-padding-free --neat-pack",
        "--no-padding-free does not go with --neat-pack: rows that are joined alone keep the documents of one row "
        "apart; leave out one of the two", None,
    ),
    "magnitudes beside a weight of one layer": (
        "posttrain", r"--train-iters 2 --lora-r 4 --use-dora --trainable layers\.2\..*linear_fc2",
        "--use-dora: decoder.layers.2.mlp.linear_fc2 is trained itself (--trainable), so its direction is not the "
        "adapter's alone; legal: --trainable for other parameters; try: leave --use-dora out",
        "--lora-target-modules linear_qkv",
    ),
}  # fmt: skip


def plan_of(door, model, words, processes=2):
    words = f"--load {model} --data-path none --dry-run --world-size {processes} {words}"
    parsed = parse(door, words.split())
    return resolve(parsed.config, parsed.problems)


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_plan(case, toy_llama):
    door, words, said, _ = REFUSED[case]
    with pytest.raises(UserError) as refused:
        plan_of(door, toy_llama, words)
    assert str(refused.value) == said


@pytest.mark.parametrize("case", [name for name, (*_, remedy) in REFUSED.items() if remedy])
def test_what_is_suggested_is_accepted(case, toy_llama):
    door, words, _, remedy = REFUSED[case]
    plan_of(door, toy_llama, f"{words} {remedy}", 1)


def test_traced_ranks_are_those_of_the_run(toy_llama):
    for words, processes in (("--profile --profile-ranks 0 2", 3), ("--profile --profile-ranks -1", 1)):
        plan_of("pretrain", toy_llama, f"--train-iters 2 {words}", processes)
