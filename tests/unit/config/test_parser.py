"""Command line and YAML: values, problems all at once, levels, docs."""

from pathlib import Path

import pytest

from mindspeed_llm.config.help import flags_markdown, help_text
from mindspeed_llm.config.parser import parse
from mindspeed_llm.config.run import door_options
from mindspeed_llm.config.schema import DOORS
from mindspeed_llm.config.upstream import upstream_flags

ROOT = Path(__file__).parents[3]


def test_values_of_every_type_are_read():
    parsed = parse(
        "posttrain",
        ["--lr", "1e-4", "--train-iters=5", "--bf16", "--no-use-flash-attn"]
        + ["--lora-target-modules", "q_proj", "v_proj", "--map-keys", '{"prompt": "question"}', "--train-epochs", "2"],
    )
    config = parsed.config
    assert parsed.problems == []
    assert (config.optimizer.lr, config.training.train_iters, config.runtime.bf16) == (1e-4, 5, True)
    assert config.operators.use_flash_attn is False
    assert config.lora.lora_target_modules == ["q_proj", "v_proj"]
    assert config.data.map_keys == {"prompt": "question"}
    assert config.training.train_epochs == 2.0
    assert config.given["lr"] == "command line" and "seed" not in config.given


def test_all_problems_are_reported_together():
    words = ["--lroa-r", "4", "--lr", "fast", "--micro-batch-size", "0", "stray", "--stage", "dpo", "--seed"]
    words += ["--no-shared-storage", "--bf16", "--bf16"]
    problems = "\n".join(parse("posttrain", words).problems)
    for part in (
        "--lroa-r is unknown; did you mean --lora-r?",
        "'fast' is not a number",
        "--micro-batch-size: 0 is wrong; legal: 1 or more",
        "'stray' does not belong to any flag",
        "--stage: 'dpo' is not a choice; legal: sft",
        "--seed needs a value",
        "--no-shared-storage is not supported",
        "--bf16 is given twice",
    ):
        assert part in problems


def test_upstream_flags_without_meaning_are_noted_with_their_values():
    parsed = parse("pretrain", ["--use-mcore-models", "--model-type", "GPT", "--train-iters", "3"])
    assert parsed.problems == []
    assert len(parsed.notes) == 2 and "--model-type has no effect here" in parsed.notes[1]
    assert parsed.config.training.train_iters == 3


def test_a_seed_is_not_negative():
    assert parse("pretrain", ["--seed", "-1"]).problems == ["--seed: -1 is wrong; legal: 0 or more"]
    whole = parse("pretrain", ["--lr-warmup-fraction", "1"])
    assert whole.problems == ["--lr-warmup-fraction: 1.0 is wrong; legal: 0 to below 1"]
    assert not parse("pretrain", ["--lr-warmup-fraction", "0"]).problems


def test_flags_of_other_doors_are_refused_with_the_doors_that_have_them():
    said = "--lr is no option of preprocess; legal with: pretrain, posttrain"
    assert parse("preprocess", ["--lr", "1"]).problems == [said]


def test_yaml_yields_to_the_command_line(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("optimizer:\n  lr: 1e-5\n  min_lr: 0\ntraining:\n  train_iters: 7\ndata:\n  json_keys: [a, b]\n")
    config = parse("pretrain", ["--train-iters", "3", "--config", str(file)]).config
    assert (config.optimizer.lr, config.training.train_iters, config.data.json_keys) == (1e-5, 3, ["a", "b"])
    assert config.given["lr"] == str(file)


@pytest.mark.parametrize(
    "text, message",
    [
        ("optimizer:\n  lrr: 1\n", "optimizer.lrr is not an option of this door; did you mean optimizer.lr?"),
        ("training:\n  lr: 1\n", "training.lr is not an option"),
        ("training:\n  train_iters: yes\n", "True is not of type int"),
        ("training:\n  train_iters: 0\n", "--train-iters: 0 is wrong"),
        ("training:\n  bf16: 1\n  bf16: 2\n", "stands twice"),
        ("- a\n", "must hold sections"),
        ("a: [", "is not YAML"),
        ("data:\n  json_keys: text\n", "'text' is not a list"),
    ],
)
def test_yaml_problems(tmp_path, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert message in "\n".join(parse("pretrain", ["--config", str(file)]).problems)


def test_a_missing_yaml_file_is_named():
    (problem,) = parse("pretrain", ["--config", "/nowhere.yaml"]).problems
    assert problem.startswith("--config: there is no file /nowhere.yaml; legal: a YAML file")


@pytest.mark.parametrize("door", DOORS)
def test_help_shows_basic_options_and_help_all_every_one(door):
    basic, everything = help_text(door, "What.", False), help_text(door, "What.", True)
    for o in door_options(door):
        assert (o.flags[0] in everything) or (o.off_flags and o.off_flags[0] in everything)
        if o.level != "basic":
            assert f"\n  {o.flags[0]} " not in basic  # deeper in, it is a word of another option's help
    assert "--help-all" in basic


def test_docs_flags_is_current():
    assert (ROOT / "docs" / "flags.md").read_text() == flags_markdown()


def test_a_row_of_the_upstream_table_speaks_to_some_door():
    spellings = {door: {f for o in door_options(door) for f in (*o.flags, *o.off_flags)} for door in DOORS}
    for flag in upstream_flags():
        assert not all(flag in known for known in spellings.values()), f"{flag} is an option of every door"
    assert "--log-interval" in spellings["pretrain"] and parse("pretrain", ["--log-interval", "5"]).notes == []
    assert "no effect" in parse("preprocess", ["--log-interval", "5"]).notes[0]
    assert {row.status for row in upstream_flags().values()} == {"no effect", "refused"}
    assert all(row.reason for row in upstream_flags().values())
