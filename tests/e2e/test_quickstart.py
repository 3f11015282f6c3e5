"""What quickstart.sh's verdict rests on: nothing leaks into the questions, and wrong answers fail."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from mindspeed_llm.checkpoint.toy import edit_config, make_toy
from mindspeed_llm.cli import inference, posttrain, preprocess
from mindspeed_llm.data.corpus import is_held_out, stdlib_documents, train_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples/quickstart"))
import judge
import prepare


def rows(directory: Path, name: str) -> list[dict]:
    return json.loads((directory / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    prepare.write_instructions(directory, shuffle_answers=False)
    return directory


@pytest.fixture(scope="module")
def shuffled(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("shuffled")
    prepare.write_instructions(directory, shuffle_answers=True)
    return directory


def test_no_module_is_on_both_sides(data):
    module_of = {f"What does {d.name} do?": d.module for d in stdlib_documents()}
    trained = {module_of[row["instruction"]] for row in rows(data, "instructions")}
    held_out = {module_of[row["instruction"]] for row in rows(data, "heldout")}
    assert trained and held_out and not trained & held_out
    assert all(is_held_out(module) for module in held_out)


def test_taught_questions_are_trained_and_unseen_ones_are_not(data):
    trained = {(row["instruction"], row["output"]) for row in rows(data, "instructions")}
    questions = rows(data, "questions")
    assert sum(question["taught"] for question in questions) == prepare.NUM_TAUGHT
    for question in questions:
        assert ((question["instruction"], question["output"]) in trained) == question["taught"]


def test_the_control_keeps_questions_and_answers_but_not_their_pairs(data, shuffled):
    true, control = rows(data, "instructions"), rows(shuffled, "instructions")
    assert {row["instruction"] for row in true} == {row["instruction"] for row in control}
    assert {row["output"] for row in control} <= {row["output"] for row in true}
    pairs = {(row["instruction"], row["output"]) for row in true}
    assert sum((row["instruction"], row["output"]) in pairs for row in control) < len(control) / 100
    assert rows(data, "questions") == rows(shuffled, "questions")


@pytest.mark.parametrize(
    "tuned_loss, given, problems",
    [(3.0, "an answer", 0), (3.1, "an answer", 1), (3.0, "an  answer\n", 0), (3.0, "an answers", 1), (4.0, "", 2)],
)
def test_the_verdict_needs_both_conditions(tuned_loss, given, problems):
    assert len(judge.Verdict(4.0, tuned_loss, [("an answer", given)]).problems()) == problems


def test_a_loss_that_is_no_number_or_nothing_taught_fails():
    assert judge.Verdict(4.0, float("nan"), [("a", "a")]).problems()
    assert judge.Verdict(4.0, 1.0, []).problems()


def tuned_verdict(base: Path, directory: Path) -> judge.Verdict:
    """Tune a tiny model on a few rows of a prepared directory and judge it as quickstart.sh does."""
    questions = [question for question in rows(directory, "questions") if question["taught"]]
    names = {question["instruction"] for question in questions}
    all_rows = rows(directory, "instructions")
    few = [row for row in all_rows if row["instruction"] in names] + all_rows[:800]
    (directory / "few.json").write_text(json.dumps(few))
    (directory / "asked.json").write_text(json.dumps(questions))
    (directory / "seldom.json").write_text(json.dumps(rows(directory, "heldout")[:50]))
    common = ["--prompt-type", "llama2", "--tokenizer-name-or-path", str(base)]
    seldom = ["--input", str(directory / "seldom.json"), "--output-prefix", str(directory / "seldom")]
    assert preprocess.main([*seldom, *common, "--handler-name", "AlpacaStyleInstructionHandler"]) == 0
    training = "--split 1,0,0 --eval-iters 0 --micro-batch-size 16 --global-batch-size 16 --train-iters 220 --lr 2e-3"
    paths = ["--load", str(base), "--save", str(directory / "tuned"), "--data-path", str(directory / "few.json")]
    cache = ["--cache-dir", str(directory / "cache"), "--save-hf", "--num-threads", "1", "--log-interval", "50"]
    assert posttrain.main(["--stage", "sft", *paths, *common, *cache, *training.split()]) == 0
    files = ["--prompt-file", str(directory / "asked.json"), "--output-file", str(directory / "said.jsonl")]
    assert inference.main(["--task", "greedy", "--load", str(directory / "tuned"), *files, *common]) == 0
    said = [json.loads(line)["answer"] for line in (directory / "said.jsonl").read_text().splitlines()]
    taught = [(question["output"], answer) for question, answer in zip(questions, said)]
    before, after = (judge.answer_loss(model, directory / "seldom") for model in (base, directory / "tuned/hf"))
    return judge.Verdict(before, after, taught)


@pytest.mark.slow
def test_shuffled_answers_fail_where_true_ones_pass(data, shuffled, tmp_path):
    base = make_toy("llama", tmp_path / "base", hidden_size=128, intermediate_size=256, num_hidden_layers=2)
    train_tokenizer(base, 997)
    edit_config(base, bos_token_id=1, eos_token_id=2, pad_token_id=None)
    (base / "generation_config.json").unlink()
    assert tuned_verdict(base, data).problems() == []
    control = tuned_verdict(base, shuffled)
    assert control.reproduced == 0
    assert any("taught" in problem for problem in control.problems())
