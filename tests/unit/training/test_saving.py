"""When a run saves, what it keeps, what it goes on from, and what it refuses: whole small runs in this process."""

import json
import os
import resource
import shutil
import signal
import types

import pytest

from mindspeed_llm.checkpoint import directory, space
from mindspeed_llm.checkpoint.directory import find_newest, is_complete, iterations
from mindspeed_llm.checkpoint.train_record import write_tracker
from mindspeed_llm.config.parser import parse
from mindspeed_llm.config.schema import StepsOrMinutes
from mindspeed_llm.errors import UserError
from mindspeed_llm.training import saving
from mindspeed_llm.training.hooks import Wish
from mindspeed_llm.training.saving import SaveSchedule

TEXT = "--seq-length 64 --lr 1e-2 --global-batch-size 4 --split 1 --eval-iters 0 --hidden-dropout 0.1 --num-threads 1"
LAST = 4


def losses(result):
    return [loss for _, loss in result.history.train]


@pytest.fixture(scope="module")
def train(toy_llama, corpus, tmp_path_factory):
    """train("--flag value ...") pre-trains the toy."""
    from mindspeed_llm.cli.training import run_door

    cache = tmp_path_factory.mktemp("cache")

    def run(*words):
        flags = (TEXT, f"--data-path {corpus} --cache-dir {cache} --progress lines", *words)
        return run_door(parse("pretrain", [piece for word in flags for piece in word.split()]))

    return run


@pytest.fixture(scope="module")
def whole(train, toy_llama, tmp_path_factory):
    """(directory with every iteration of an undisturbed run, its losses)."""
    out = tmp_path_factory.mktemp("whole") / "out"
    found = train(f"--load {toy_llama} --train-iters {LAST} --save {out} --save-interval 1")
    return out, losses(found)


@pytest.fixture
def copy(whole, tmp_path):
    """The undisturbed run's directory, to be damaged."""
    return shutil.copytree(whole[0], tmp_path / "copy")


def flip(path):
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


# When


def schedule(text, clock, monkeypatch, leader=True):
    monkeypatch.setattr(saving, "is_leader", lambda: leader)
    return SaveSchedule(parse("pretrain", text.split()).config, clock)


def end_of_iteration(hook, number, told=None):
    loop = types.SimpleNamespace(progress=types.SimpleNamespace(iteration=number))
    hook.after_backward(loop, types.SimpleNamespace(flags=dict(hook.flags()) if told is None else told))
    return hook.end_of_iteration(loop)


def test_checkpoints_are_due_after_iterations(monkeypatch):
    hook = schedule("--save-interval 3", lambda: 0.0, monkeypatch)
    assert hook.flags() == {}, "nobody asked for minutes, so nobody needs to be told"
    assert [n for n in range(1, 10) if Wish.SAVE in end_of_iteration(hook, n)] == [3, 6, 9]


def test_checkpoints_are_due_after_minutes_by_the_first_ranks_clock(monkeypatch):
    now = [0.0]
    hook = schedule("--save-interval 1.5m", lambda: now[0], monkeypatch)
    due = []
    for number in range(1, 11):
        now[0] += 40.0
        if Wish.SAVE in end_of_iteration(hook, number):
            due.append(number)
    assert due == [3, 6, 9]


def test_other_ranks_do_as_they_are_told_whatever_their_clocks_say(monkeypatch):
    fast = schedule(
        "--save-interval 1m --exit-duration-in-mins 2", iter(range(0, 10**6, 1000)).__next__, monkeypatch, False
    )
    assert fast.flags() == {"save due": 0.0, "time is up": 0.0}
    assert end_of_iteration(fast, 1, {"save due": 0.0, "time is up": 0.0}) == Wish.NOTHING
    assert end_of_iteration(fast, 2, {"save due": 1.0, "time is up": 0.0}) == Wish.SAVE
    assert end_of_iteration(fast, 3, {"save due": 0.0, "time is up": 1.0}) == Wish.LEAVE
    assert fast.reason == "--exit-duration-in-mins 2"


def test_a_run_that_has_lasted_long_enough_leaves_with_a_checkpoint(train, toy_llama, tmp_path, monkeypatch, capsys):
    seconds = iter(range(0, 10**6, 70))
    monkeypatch.setattr(SaveSchedule.__init__, "__defaults__", (lambda: float(next(seconds)),))
    found = train(f"--load {toy_llama} --train-iters 9 --exit-duration-in-mins 2 --save {tmp_path / 'out'}")
    assert found.progress.iteration == 2 and found.checkpoint.name == "iter_0000002"
    assert "stopped after iteration 2 by --exit-duration-in-mins 2: saved to" in capsys.readouterr().out


@pytest.mark.parametrize("text, iterations_, minutes", [("500", 500, None), ("30m", None, 30.0), (".5m", None, 0.5)])
def test_intervals_are_steps_or_minutes(text, iterations_, minutes):
    value = StepsOrMinutes(text)
    assert (value.problem(), value.iterations, value.minutes) == (None, iterations_, minutes)


@pytest.mark.parametrize("text", ["0", "0m", "m", "-5", "5.5", "5h", "", "1..2m"])
def test_other_intervals_are_refused(text):
    assert "500" in StepsOrMinutes(text).problem()


def test_yaml_takes_both(tmp_path):
    for written, read in (("500", "500"), ("30m", "30m")):
        (tmp_path / "run.yaml").write_text(f"checkpoint:\n  save_interval: {written}\n")
        parsed = parse("pretrain", ["--config", str(tmp_path / "run.yaml")])
        assert parsed.problems == [] and parsed.config.checkpoint.save_interval == read
    (tmp_path / "run.yaml").write_text("checkpoint:\n  save_interval: true\n")
    assert "save_interval" in parse("pretrain", ["--config", str(tmp_path / "run.yaml")]).problems[0]


# What is kept, and room for it


def test_keep_last_keeps_the_newest(train, toy_llama, tmp_path):
    out = tmp_path / "out"
    train(f"--load {toy_llama} --train-iters 4 --save {out} --save-interval 1 --keep-last 2")
    assert list(iterations(out)) == [3, 4]


def test_too_little_room_is_found_before_training(train, toy_llama, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(space, "free_bytes", lambda path: 2**20)
    with pytest.raises(UserError, match=r"too little room, 1 MiB, because 1 checkpoint of 3.64 MiB"):
        train(f"--load {toy_llama} --train-iters 1 --save {tmp_path / 'out'}")
    with pytest.raises(UserError, match=r"3 checkpoints of .* and a Hugging Face model of 1.19 MiB"):
        train(f"--load {toy_llama} --train-iters 1 --save {tmp_path / 'out'} --keep-last 2 --save-hf")
    assert "iteration " not in capsys.readouterr().out.replace("iterations", "")


def test_room_that_goes_away_is_found_before_the_save(train, toy_llama, tmp_path, monkeypatch):
    out = tmp_path / "out"
    free = iter([2**40, 2**40, 2**20])
    monkeypatch.setattr(space, "free_bytes", lambda path: next(free))
    with pytest.raises(UserError, match="too little room, 1 MiB"):
        train(f"--load {toy_llama} --train-iters 3 --save {out} --save-interval 1")
    assert list(iterations(out)) == [1] and is_complete(find_newest(out))


def test_a_disk_that_fills_up_meanwhile_ends_the_run_with_the_checkpoint_before(train, toy_llama, tmp_path, capsys):
    """A limit on the size of files stands for it: the kernel refuses in the middle of a file."""
    out, limits = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_up(stage):
        if stage == "begun" and (out / "iter_0000002.tmp").exists():
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    directory.observers.append(fill_up)
    try:
        with pytest.raises(UserError, match="iter_0000002 cannot be written.*iter_0000001 is intact") as refused:
            train(f"--load {toy_llama} --train-iters 3 --save {out} --save-interval 1")
    finally:
        directory.observers.remove(fill_up)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(refused.value)
    assert find_newest(out).name == "iter_0000001" and not list(out.glob("*.tmp"))
    assert train(f"--load {out} --save {out} --train-iters 2").progress.iteration == 2


@pytest.mark.parametrize("more", ["", "--bf16", "--lora-r 4", "--no-save-optim", "--trainable mlp"])
def test_the_estimate_of_a_checkpoint_is_near_its_size(train, toy_llama, tmp_path, monkeypatch, more):
    estimates = []
    monkeypatch.setattr(saving, "space_problem", lambda root, needed, what: estimates.append(needed))
    found = train(f"--load {toy_llama} --train-iters 1 --save {tmp_path / 'out'} {more}")
    written = sum(path.stat().st_size for path in found.checkpoint.glob("*.distcp"))
    # heads of boxes (1 KiB each) and random states are not counted: nothing beside a model of any size
    assert 0 <= written - estimates[0] < 150_000


def test_verify_checkpoint_save_reads_everything_back(train, toy_llama, tmp_path, monkeypatch):
    def forgetful_disk(aside):
        flip(next(aside.glob("*.distcp")))

    monkeypatch.setattr(directory, "forget_cached", forgetful_disk)
    run = f"--load {toy_llama} --train-iters 1 --save"
    with pytest.raises(UserError, match="is not on the disk as it was written"):
        train(f"{run} {tmp_path / 'checked'} --verify-checkpoint save")
    assert find_newest(tmp_path / "checked") is None
    train(f"{run} {tmp_path / 'not_checked'}")


# What is loaded


@pytest.mark.parametrize(
    "name", ["__0_0.distcp", ".metadata", "common.pt", "metadata.json", "mindspeed_llm.json", "manifest.json"]
)
@pytest.mark.parametrize("how", ["truncated", "flipped", "missing"])
def test_a_damaged_file_of_any_kind_is_named_and_passed_over(copy, how, name):
    from mindspeed_llm.checkpoint.manifest import changed_file, damage
    from mindspeed_llm.plan.source import find_source

    file = copy / f"iter_{LAST:07d}" / name
    if how == "truncated":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif how == "flipped":
        flip(file)
    else:
        file.unlink()
    wrong = damage(file.parent) or changed_file(file.parent)
    assert wrong is not None and (name in wrong or name == "manifest.json")
    if damage(file.parent) is not None:
        with pytest.raises(UserError, match=f"{file.parent.name} is damaged.*complete: .*iter_{LAST - 1:07d}"):
            find_source(copy)
        found = find_source(copy, fall_back=True)
        assert found.directory.name == f"iter_{LAST - 1:07d}" and file.parent.name in found.skipped[0]


@pytest.mark.parametrize("how", ["truncated", "flipped", "gone"])
def test_a_resume_goes_on_from_the_newest_intact_one(train, whole, copy, capsys, how):
    newest = copy / f"iter_{LAST:07d}"
    if how == "truncated":
        file = newest / "__0_0.distcp"
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "flipped":
        flip(newest / "__0_0.distcp")
    else:
        shutil.rmtree(newest)
    found = train(f"--load {copy} --save {copy} --train-iters {LAST}")
    assert losses(found) == whole[1][LAST - 1 :]
    said = capsys.readouterr().out
    assert newest.name in said and f"iter_{LAST - 1:07d}" in said
    assert is_complete(newest), "the iteration is saved again in place of the damaged one"


def test_without_checksums_a_flipped_bit_is_trained_on(train, whole, copy):
    """Negative control: the check of sizes alone takes it for good."""
    from mindspeed_llm.checkpoint.detect import open_source

    source = open_source(copy / "iter_0000003")
    flip(copy / "iter_0000003" / "__0_0.distcp")
    found = train(f"--load {copy} --ckpt-step 3 --train-iters {LAST} --verify-checkpoint off")
    assert source.names() and found.progress.iteration == LAST


def test_an_iteration_asked_for_by_number_has_no_substitute(train, copy):
    flip(copy / "iter_0000003" / "__0_0.distcp")
    with pytest.raises(UserError, match="iter_0000003 is damaged, because __0_0.distcp was changed"):
        train(f"--load {copy} --ckpt-step 3 --train-iters {LAST}")
    (copy / "iter_0000002" / "common.pt").unlink()
    with pytest.raises(UserError, match="iter_0000002 is damaged, because common.pt is missing"):
        train(f"--load {copy} --ckpt-step 2 --train-iters {LAST}")


def test_weights_for_another_purpose_have_no_substitute_either(train, copy):
    (copy / f"iter_{LAST:07d}" / "common.pt").unlink()
    with pytest.raises(UserError, match="common.pt is missing; complete: iter_0000001, iter_0000002, iter_0000003"):
        train(f"--load {copy} --finetune --train-iters 1")


def test_the_newest_healthy_one_can_be_resumed(train, whole, copy):
    directory.mark_health(copy / "iter_0000002", True, [])
    for number in (3, LAST):
        directory.mark_health(copy / f"iter_{number:07d}", False, ["loss spike"])
    found = train(f"--load {copy} --load-healthy --train-iters {LAST}")
    assert losses(found) == whole[1][2:]
    for number in (1, 2):
        directory.mark_health(copy / f"iter_{number:07d}", False, ["seen later"])
    with pytest.raises(UserError, match="iter_0000003: is not marked healthy"):
        train(f"--load {copy} --load-healthy --train-iters {LAST}")


def test_a_checkpoint_without_manifest_loads_as_before(train, whole, copy):
    """Those of earlier versions have none."""
    for path in iterations(copy).values():
        (path / "manifest.json").unlink()
        record = json.loads((path / "mindspeed_llm.json").read_text())
        (path / "mindspeed_llm.json").write_text(json.dumps({k: v for k, v in record.items() if k != "manifest"}))
    write_tracker(copy, 3)
    assert losses(train(f"--load {copy} --train-iters {LAST}")) == whole[1][3:]


# The same command again


@pytest.mark.parametrize("first_start", ["", "--finetune --no-load-optim --no-load-rng"])
def test_the_same_command_goes_on_where_it_ended(train, toy_llama, whole, tmp_path, first_start):
    out = tmp_path / "out"
    command = f"--load {toy_llama} --train-iters {LAST} --save {out} --auto-resume --exit-interval 2 {first_start}"
    assert losses(train(command)) == whole[1][:2]
    assert losses(train(command)) == whole[1][2:]


def test_a_launcher_that_starts_workers_again_means_the_same(train, toy_llama, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    command = f"--load {toy_llama} --train-iters {LAST} --save {out} --exit-interval 2"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    train(command)
    with pytest.raises(UserError, match="already holds a checkpoint.*--auto-resume"):
        train(command)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert losses(train(command)) == whole[1][2:]


def test_a_run_that_began_with_something_else_is_not_gone_on_from(train, toy_llama, toy_qwen, tmp_path):
    out = tmp_path / "out"
    train(f"--load {toy_llama} --train-iters 1 --save {out}")
    with pytest.raises(UserError, match=f"began with load {toy_llama.resolve()} and this one begins with {toy_qwen}"):
        train(f"--load {toy_qwen} --train-iters 2 --save {out} --auto-resume")
    with pytest.raises(UserError, match="--seed was 1234 and is now 5"):
        train(f"--load {toy_llama} --train-iters 2 --save {out} --auto-resume --seed 5")


def test_a_run_that_went_back_to_an_earlier_iteration_does_so_once(train, whole, copy):
    command = f"--load {copy} --save {copy} --ckpt-step 1 --train-iters {LAST} --auto-resume --exit-interval 2"
    assert losses(train(command)) == whole[1][1:2]
    assert losses(train(command)) == whole[1][2:]


def test_adapters_go_on_over_their_base(train, toy_llama, tmp_path):
    command = f"--load {toy_llama} --lora-r 4 --lora-dropout 0.1 --train-iters {LAST} --save"
    expected = losses(train(f"{command} {tmp_path / 'whole'}"))
    out = f"{command} {tmp_path / 'out'} --auto-resume --exit-interval 2"
    assert losses(train(out)) + losses(train(out)) == expected


def test_without_optimizer_state_nothing_is_gone_on_from(train, toy_llama, tmp_path, capsys):
    out = tmp_path / "out"
    train(f"--load {toy_llama} --train-iters 1 --save {out} --no-save-optim")
    assert "it can be tuned from, not resumed" in capsys.readouterr().out
    for again in (f"--load {out}", f"--load {toy_llama} --auto-resume --save {out}"):
        with pytest.raises(UserError, match="cannot be gone on from, because it was saved with --no-save-optim"):
            train(f"{again} --train-iters 2")
    assert train(f"--load {out} --finetune --train-iters 1").progress.consumed_samples == 4


# Looking at them


def command(*words):
    from mindspeed_llm.__main__ import main

    return main(["checkpoint", *map(str, words)])


def test_checkpoints_are_listed_verified_and_pruned(copy, capsys):
    directory.mark_health(copy / "iter_0000001", False, ["loss spike"])
    (copy / "iter_0000002" / "common.pt").unlink()
    os.makedirs(copy / "iter_0000009" / "mp_rank_00")
    assert command("list", copy) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [[line[: lines[0].index("state")].split(), line] for line in lines[1:]]
    assert [cells for cells, _ in rows] == [["1"], ["2"], ["3"], ["->", "4"], ["9"]]
    assert "no: loss spike" in rows[0][1] and "DAMAGED: common.pt is missing" in rows[1][1] and "foreign" in rows[4][1]
    assert "complete" in rows[3][1] and "MiB" in rows[3][1] and "one rank" in rows[3][1]
    assert command("verify", copy) == 1
    flip(copy / "iter_0000003" / "__0_0.distcp")
    command("verify", copy)
    said = capsys.readouterr().out
    assert "iter_0000004  intact" in said and "iter_0000003  DAMAGED: __0_0.distcp was changed" in said
    assert command("prune", copy, "--keep-last", 1) == 0
    assert sorted(iterations(copy)) == [2, 4, 9], "what is damaged or foreign stays"
    assert command("prune", copy, "--keep-last", 0) == 1 and command("list", copy / "iter_0000004") == 1
