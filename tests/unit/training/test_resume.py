"""A run resumed after any step, with or without evaluation between, and what the comparison notices."""

import json
import pydoc_data.topics
from unittest import mock

import pytest

from mindspeed_llm.errors import UserError

FLAGS = (
    "--stage sft --prompt-type chatml --seq-length 128 --lr 1e-3 --global-batch-size 4 --micro-batch-size 2 "
    "--split 80,20 --hidden-dropout 0.1 --attention-dropout 0.1 --train-iters 5 --eval-iters 1 --num-threads 1"
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Eleven rows, nine of them for training: epochs end in the middle of the third and the fifth batch."""
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    topics = pydoc_data.topics.topics
    rows = [
        {"instruction": f"What is {n}?", "input": "", "output": " ".join(topics[n].split()[: 4 + 3 * i])}
        for i, n in enumerate(sorted(topics)[:11])
    ]
    path.write_text(json.dumps(rows))
    return path


def steps(result):
    """The training losses of a run."""
    return [loss for _, loss in result.history.train]


@pytest.fixture(scope="module")
def saved(toy_llama, rows, tmp_path_factory):
    """(losses of the whole run, directory with a checkpoint after every step of it)."""
    from mindspeed_llm.cli.training import run_door
    from mindspeed_llm.config.parser import parse

    out = tmp_path_factory.mktemp("saved")
    words = f"{FLAGS} --load {toy_llama} --data-path {rows} --progress lines --save {out} --save-interval 1"
    with mock.patch.dict("os.environ", MINDSPEED_LLM_CACHE=str(rows.parent / "cache")):
        return steps(run_door(parse("posttrain", words.split()))), out


@pytest.fixture
def resume(door, saved, rows, monkeypatch):
    """Losses of the run that `--load` alone continues after a step."""
    monkeypatch.setenv("MINDSPEED_LLM_CACHE", str(rows.parent / "cache"))
    return lambda step, more="": steps(door("posttrain", f"--load {saved[1]} --ckpt-step {step} {more}"))


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_a_run_goes_on_from_any_step(saved, resume, step):
    assert resume(step) == saved[0][step:]


def test_evaluation_between_disturbs_nothing(saved, resume):
    assert resume(1, "--eval-interval 1") == resume(1, "--eval-iters 0") == saved[0][1:]


def test_a_checkpoint_is_evaluated_as_in_its_training(door, saved, rows, monkeypatch, capsys):
    """The weights are read, the data are those of the training where no others are given, and nothing is written."""
    monkeypatch.setenv("MINDSPEED_LLM_CACHE", str(rows.parent / "cache"))
    load = f"--load {saved[1]}"
    iteration, loss = door("posttrain", load, "--ckpt-step 4").history.valid[-1]
    alone = door("posttrain", load, "--eval-only", f"--save {saved[1]}").evaluation
    assert (iteration, alone.loss) == (5, loss)
    assert f"validation loss at iteration 5 | lm loss: {loss:.6E}" in capsys.readouterr().out
    assert door("posttrain", load, "--ckpt-step 1 --eval-only").evaluation.loss != loss
    other = door("posttrain", load, "--eval-only --split 50,50").evaluation
    assert other.trained_tokens != alone.trained_tokens


def test_another_kind_of_training_starts_anew_from_the_weights(door, saved, rows, corpus, tmp_path, capsys):
    """Adapters on a tuned model, or pre-training of one, are no resume; adapters alone name their base."""
    once = f"--load {saved[1]} --train-iters 1 --eval-iters 0"
    door("posttrain", once, f"--data-path {rows} --lora-r 2 --save {tmp_path / 'lora'}")
    assert "adapters are asked for: they start anew" in capsys.readouterr().out
    more = door("posttrain", f"--lora-load {tmp_path / 'lora'} --train-iters 2")
    assert [iteration for iteration, _ in more.history.train] == [2]
    capsys.readouterr()
    result = door("pretrain", once, f"--data-path {corpus} --seq-length 64")
    assert "was saved by posttrain: this run starts anew" in capsys.readouterr().out
    assert [iteration for iteration, _ in result.history.train] == [1]


def test_a_state_that_is_not_restored_is_noticed(saved, resume):
    """Negative controls of the tests above, one for each part of the state that is not a tensor."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    from mindspeed_llm.checkpoint import optimizer_state, training_state
    from mindspeed_llm.training.data import TrainingData

    original = TrainingData.sample_indices

    def shifted(self, consumed_samples, part="train"):
        return original(self, consumed_samples + 1, part)

    for where, name, broken in (
        (training_state, "restore_rng_states", lambda states: None),
        (TrainingData, "sample_indices", shifted),
        (OptimizerParamScheduler, "load_state_dict", lambda self, state: None),
        (optimizer_state, "set_optimizer_step", lambda optimizer, step: None),
    ):
        with mock.patch.object(where, name, broken):
            found = resume(2)
        assert len(found) == 3 and found != saved[0][2:], name


def test_an_optimizer_that_counts_by_group_goes_on(toy_llama, rows, door, tmp_path, monkeypatch):
    """Where Apex or Transformer Engine is installed, megatron takes theirs: a fresh one of it holds no count."""
    from megatron.core import optimizer

    from mindspeed_llm.models.stand_ins.transformer_engine.pytorch.optimizers import FusedAdam

    monkeypatch.setattr(optimizer, "Adam", FusedAdam)
    monkeypatch.setattr(optimizer, "USING_PYTORCH_OPTIMIZER", False)
    monkeypatch.setenv("MINDSPEED_LLM_CACHE", str(rows.parent / "cache"))
    run = f"{FLAGS} --data-path {rows} --save {tmp_path / 'out'} --save-interval 2"
    whole = steps(door("posttrain", f"{run} --load {toy_llama}"))
    assert steps(door("posttrain", f"--load {tmp_path / 'out'} --ckpt-step 2")) == whole[2:]


def test_the_position_in_the_data_is_said(resume, capsys):
    resume(3)
    said = capsys.readouterr().out
    assert "resuming at iteration 3: 5 iterations of 4 samples, 9 samples per epoch" in said
    assert " data: 12 samples (1.33 epochs) are consumed; next comes row " in said


def test_the_schedule_goes_on_without_the_optimizer(saved, resume, capsys):
    capsys.readouterr()
    resume(3)
    expected = rates(capsys.readouterr().out)
    assert resume(3, "--no-load-optim") != saved[0][3:]
    assert rates(capsys.readouterr().out) == expected
    assert len(set(expected)) == 2


def rates(text):
    """Learning rates in log lines."""
    return [line.split("learning rate: ")[1].split(" ")[0] for line in text.splitlines() if "learning rate: " in line]


def test_a_longer_run_says_that_its_schedule_changes(door, saved, rows, resume, capsys):
    found = resume(4, "--train-iters 6")
    assert "--train-iters was 5 and is now 6; the learning rate follows" in capsys.readouterr().out
    assert len(found) == 2 and found[0] == saved[0][4]


def test_a_finished_run_has_nothing_left_to_do(resume, capsys):
    assert resume(5) == []


def test_blends_are_trained_on_and_continued(door, toy_llama, instructions, rows, tmp_path, capsys):
    words = f"{FLAGS.replace('--train-iters 5', '--train-iters 4')} --load {toy_llama}"
    blend = f"--data-path 0.25 {rows} 0.75 {instructions}"
    whole = steps(door("posttrain", words, blend))
    assert "a blend of 2 sets" in capsys.readouterr().out
    out = tmp_path / "out"
    first = steps(door("posttrain", words, blend, f"--save {out} --exit-interval 2"))
    capsys.readouterr()
    with pytest.raises(UserError, match="--data-path was '0.25 .* and is now '0.5 .*--allow-change data-path"):
        door("posttrain", f"--load {out} --data-path 0.5 {rows} 0.5 {instructions}")
    assert first + steps(door("posttrain", f"--load {out}")) == whole
    said = " ".join(capsys.readouterr().out.split())
    assert " 25.000% 9 0.44 (0.22 done) " in said


def test_a_blend_is_planned_without_starting(door, toy_llama, rows, capsys):
    assert door("posttrain", FLAGS, f"--load {toy_llama} --data-path 3 {rows} 1 nowhere.json --dry-run") is None
    said = " ".join(capsys.readouterr().out.split())
    assert "data path, weight 3" in said and "data path, weight 1 │ nowhere.json (not there yet)" in said
    with pytest.raises(UserError, match="every data set needs a weight or none"):
        door("posttrain", FLAGS, f"--load {toy_llama} --data-path 3 {rows} nowhere.json --dry-run")


def test_a_set_without_validation_samples_is_left_out_of_evaluation(door, toy_llama, instructions, tmp_path):
    """And a set without training samples is refused: its share could not be read."""
    small = tmp_path / "small.json"
    small.write_text(json.dumps([{"instruction": "a", "input": "", "output": "b"}]))
    words = f"{FLAGS} --load {toy_llama}".replace("--train-iters 5", "--train-iters 1")
    result = door("posttrain", words, f"--data-path {small} {instructions}")
    alone = door("posttrain", words, f"--data-path {instructions}", "--eval-only")
    assert len(result.history.valid) == 1 and alone.evaluation.trained_tokens > 0
    with pytest.raises(UserError, match="this split has no rows"):
        door("posttrain", words.replace("80,20", "20,80"), f"--data-path {small} {instructions}")
