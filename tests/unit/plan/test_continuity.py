"""What a resume takes from its checkpoint: every option, and whether a change is refused, said, or the start's own."""

import json

import pytest

from mindspeed_llm.config.parser import parse
from mindspeed_llm.config.run import all_options, door_options
from mindspeed_llm.config.schema import TRAINING_DOORS
from mindspeed_llm.errors import UserError
from mindspeed_llm.plan.combinations import combination_problems
from mindspeed_llm.plan.continuity import TOGETHER, continue_run, recorded_options, unknown_changes
from mindspeed_llm.training.data import TrainingData

# Option that may not change -> (value in the checkpoint, words that say another).
FIXED = {
    "handler_name": ("GeneralPretrainHandler", "--handler-name AlpacaStyleInstructionHandler"),
    "prompt_type": ("chatml", "--prompt-type llama3"),
    "seq_length": (128, "--seq-length 256"),
    "split": ("949,50,1", "--split 80,20"),
    "seed": (1234, "--seed 7"),
    "stage": ("other", "--stage sft"),
    "global_batch_size": (8, "--global-batch-size 4"),
    "reset_attention_mask": (True, "--no-reset-attention-mask"),
    "mtp_loss_scaling_factor": (0.1, "--mtp-loss-scaling-factor 0.3"),
    "no_shuffle": (False, "--no-shuffle"),
    "o2_optimizer": (False, "--bf16 --o2-optimizer"),
}


def config(words, door="posttrain"):
    parsed = parse(door, words.split())
    assert parsed.problems == []
    return parsed.config


def test_the_table_knows_every_option_that_may_not_change():
    fixed = {o.name for door in TRAINING_DOORS for o in door_options(door) if o.kind == "continuity"}
    assert fixed == {*FIXED, "data_path"}  # whose files and weights are compared, not their spelling


@pytest.mark.parametrize("name", FIXED)
def test_a_change_is_refused_unless_it_is_allowed(name):
    before, words = FIXED[name]
    record = {"continuity": {name: before}}
    (problem,), notes = continue_run(config(words), record)
    flag = all_options()[name].flags[0]
    assert problem.startswith(f"resume: {flag} was {before} and is now ") and f"--allow-change {flag[2:]}" in problem
    assert notes == []
    assert continue_run(config(f"{words} --allow-change {flag[2:]}"), record) == ([], [])
    unchanged = config("")
    assert continue_run(unchanged, record) == ([], []) and unchanged.get(name) == before


class Files(TrainingData):
    """Data with this fingerprint."""

    def __init__(self, plan, digest):
        self.plan, self.digest = plan, digest

    def fingerprint(self):
        return self.digest


def test_other_files_and_weights_are_refused():
    from types import SimpleNamespace

    record = {"data": "abc", "continuity": {"data_path": ["0.3", "a", "0.7", "b"]}}

    def check(words, digest):
        Files(SimpleNamespace(config=config(words)), digest).check_unchanged(record)

    check("--data-path 30 a 70 /moved/b", "abc")
    for words, said in (
        ("0.4 a 0.6 b", "'0.3 a 0.7 b' and is now '0.4 a 0.6 b'"),
        ("0.3 a 0.7 b", "'0.3 a 0.7 b', bec"),
    ):
        with pytest.raises(UserError, match=f"resume: --data-path (was )?{said}.*; legal: .*; try: --allow-change"):
            check(f"--data-path {words}", "def")
        check(f"--data-path {words} --allow-change data-path", "def")


def test_what_is_not_held_fixed_needs_no_permission():
    (line,) = unknown_changes(config("--allow-change lr seed"))
    assert line.startswith("--allow-change: lr is wrong") and "global-batch-size" in line
    assert unknown_changes(config("--allow-change seed global-batch-size")) == []


def test_the_other_options_keep_the_values_they_were_saved_with():
    before = config(
        "--lr 3e-4 --min-lr 1e-5 --lr-decay-style WSD --bf16 --micro-batch-size 2 --trainable-layers last:2"
    )
    record = {"continuity": {}, "options": json.loads(json.dumps(recorded_options(before)))}
    after = config("--min-lr 0")
    problems, notes = continue_run(after, record)
    assert problems == [] and notes == ["resume: --min-lr was 1e-05 and is now 0.0"]
    assert recorded_options(after) == recorded_options(before) | {"min_lr": 0.0}
    assert after.runtime.bf16 and after.training.trainable_layers == "last:2"


def test_what_belongs_to_a_start_is_not_taken_over():
    words = "--exit-interval 3 --tensor-model-parallel-size 2 --trust-remote-code --workers 3 --save here --dry-run"
    record = {"continuity": {}, "options": recorded_options(config(words))}
    after = config("")
    assert continue_run(after, record) == ([], [])
    assert after == config("")


@pytest.mark.parametrize(
    "before, words, expected",
    [
        ("--train-epochs 2", "--train-iters 5", {"train_iters": 5, "train_epochs": None}),
        ("--train-iters 4", "--train-epochs 3", {"train_iters": None, "train_epochs": 3.0}),
        ("--bf16", "--fp16", {"bf16": False, "fp16": True}),
        ("--lr-warmup-fraction 0.1", "--lr-warmup-iters 3", {"lr_warmup_fraction": None, "lr_warmup_iters": 3}),
        ("--trainable-layers last:1", "--freeze norm", {"trainable_layers": None, "freeze": ["norm"]}),
        ("--pack", "--neat-pack", {"pack": False, "neat_pack": True}),
        ("--recompute-norm --recompute-norm-num-layers 1", "--no-recompute-norm", {"recompute_norm_num_layers": None}),
    ],
)
def test_options_that_exclude_each_other_are_decided_together(before, words, expected):
    after = config(words)
    continue_run(after, {"continuity": {}, "options": recorded_options(config(before))})
    assert {name: after.get(name) for name in expected} == expected


@pytest.mark.parametrize(
    "before, off",
    [
        ("--recompute-norm --recompute-norm-num-layers 1", "--no-recompute-norm"),
        (
            "--recompute-activation-function --recompute-activation-function-num-layers 1",
            "--no-recompute-activation-function",
        ),
        ("--moe-zero-memory level0 --moe-zero-memory-num-layers 1", "--moe-zero-memory disable"),
        ("--loss-compute-mode chunk --loss-chunk-size 5", "--no-cross-entropy-loss-fusion"),
    ],
)
def test_a_resume_switches_off_what_has_a_number(before, off):
    """The number that was saved with it would otherwise be refused as meaningless, and nothing could take it back."""
    record = {"continuity": {}, "options": recorded_options(config(before))}
    as_before, after = config(""), config(off)
    for each in (as_before, after):
        assert continue_run(each, record)[0] == []
    assert combination_problems(as_before) == [] == combination_problems(after)
    after.set(before.split()[-2].removeprefix("--").replace("-", "_"), 1)
    assert len(combination_problems(after)) == 1


def test_groups_hold_options_that_exist():
    assert {name for group in TOGETHER for name in group} <= set(all_options())


def test_a_longer_run_says_that_its_schedule_changes():
    before = {"continuity": {}, "options": recorded_options(config("--train-iters 6"))}
    (note,) = continue_run(config("--train-iters 8"), before)[1]
    assert note.startswith(
        "resume: --train-iters was 6 and is now 8; the learning rate follows the schedule of the new"
    )
    for more in ("--lr-decay-iters 6", "--lr-decay-style constant"):
        notes = continue_run(config(f"--train-iters 8 {more}"), before)[1]
        assert "resume: --train-iters was 6 and is now 8" in notes


def test_options_of_another_version_are_passed_over():
    after = config("")
    assert continue_run(after, {"continuity": {}, "options": {"gone": 3, "lr": 0.5}}) == ([], [])
    assert after.optimizer.lr == 0.5
