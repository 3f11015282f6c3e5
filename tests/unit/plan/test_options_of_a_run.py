"""Options that act only while something runs: resuming, saving, what is printed."""

import json
import random
import re
import shutil
import threading
import time

import pytest

from mindspeed_llm.checkpoint.directory import find_newest
from mindspeed_llm.errors import UserError

FLAGS = (
    "--seq-length 64 --lr 1e-2 --lr-decay-style constant --global-batch-size 2 --split 1 --hidden-dropout 0.1 "
    "--num-threads 1"
)


def losses(result):
    return [loss for _, loss in result.history.train]


@pytest.fixture(scope="module")
def door(toy_llama, texts, tmp_path_factory):
    """door("--flag value ...", ...) pre-trains the toy with a progress of lines."""
    from mindspeed_llm.cli.training import run_door
    from mindspeed_llm.config.parser import parse

    cache = tmp_path_factory.mktemp("cache")

    def run(*words):
        flat = [piece for word in (FLAGS, f"--data-path {texts} --cache-dir {cache}", *words) for piece in word.split()]
        return run_door(parse("pretrain", flat))

    return run


@pytest.fixture(scope="module")
def saved(door, toy_llama, tmp_path_factory):
    """(checkpoint after 2 of 4 iterations, losses of iterations 3 and 4)."""
    out = tmp_path_factory.mktemp("saved") / "out"
    whole = door(f"--load {toy_llama} --train-iters 4 --save {out} --save-interval 2 --progress lines")
    return out, losses(whole)[2:]


def test_a_plain_resume_goes_on(door, saved):
    out, expected = saved
    assert losses(door(f"--load {out} --ckpt-step 2 --train-iters 4 --progress lines")) == expected


def test_no_load_optim_forgets_the_moments(door, saved):
    out, expected = saved
    found = losses(door(f"--load {out} --ckpt-step 2 --train-iters 4 --no-load-optim --progress lines"))
    # the same weights and dropout at first; the second step starts from moments that were begun again
    assert found[0] == expected[0]
    assert found[1] != expected[1]


def test_no_load_rng_draws_other_dropout(door, saved):
    out, expected = saved
    found = losses(door(f"--load {out} --ckpt-step 2 --train-iters 4 --no-load-rng --progress lines"))
    assert found[0] != expected[0]


def test_no_save_optim_cannot_be_resumed(door, toy_llama, tmp_path):
    out = tmp_path / "out"
    door(f"--load {toy_llama} --train-iters 1 --save {out} --no-save-optim --progress lines")
    assert json.loads((out / "iter_0000001" / "mindspeed_llm.json").read_text())["resumable"] is False
    with pytest.raises(UserError, match="saved with --no-save-optim; try: --finetune"):
        door(f"--load {out} --train-iters 2 --progress lines")
    again = door(f"--load {out} --finetune --train-iters 1 --progress lines")
    assert again.progress.consumed_samples == 2


def test_async_save_writes_the_same_in_a_thread(door, toy_llama, tmp_path, monkeypatch, capsys):
    from mindspeed_llm.checkpoint import train_save

    threads, merge = [], train_save.merge_parts

    def noted(*arguments):
        threads.append(threading.current_thread() is threading.main_thread())
        return merge(*arguments)

    monkeypatch.setattr(train_save, "merge_parts", noted)
    flags = f"--load {toy_llama} --train-iters 4 --save-interval 2 --progress lines"
    runs = {name: door(f"{flags} --save {tmp_path / name}", *more) for name, more in SAVES.items()}
    assert losses(runs["beside"]) == losses(runs["plain"])
    assert threads == [True, True, False, False]
    assert capsys.readouterr().out.count(" saved checkpoint at iteration ") == 4
    for iteration in ("iter_0000002", "iter_0000004"):
        beside, plain = (tmp_path / name / iteration / "__0_0.distcp" for name in ("beside", "plain"))
        assert beside.read_bytes() == plain.read_bytes()
    again = door(f"--load {tmp_path / 'beside'} --ckpt-step 2 --train-iters 4 --progress lines")
    assert losses(again) == losses(runs["plain"])[2:]


SAVES = {"plain": [], "beside": ["--async-save"]}


class Foreign:
    """An object of a class that no checkpoint needs."""

    def __reduce__(self):
        return random.Random, (0,)


def test_trust_checkpoint_admits_objects_that_run_code(door, saved, tmp_path):
    import torch

    from mindspeed_llm.checkpoint.manifest import write_manifest

    foreign = tmp_path / "foreign"
    shutil.copytree(saved[0], foreign)
    directory = foreign / "iter_0000002"
    common = torch.load(directory / "common.pt", weights_only=True)
    torch.save(common | {"foreign": Foreign()}, directory / "common.pt")
    write_manifest(directory)
    flags = f"--load {foreign} --ckpt-step 2 --train-iters 4 --progress lines"
    with pytest.raises(UserError, match=r"common.pt is refused, because loading it may run code .*--trust-checkpoint"):
        door(flags)
    assert losses(door(flags, "--trust-checkpoint")) == saved[1]


def test_save_hf_writes_what_was_trained(door, toy_llama, tmp_path):
    import torch

    from mindspeed_llm.checkpoint.detect import open_source

    out = tmp_path / "out"
    door(f"--load {toy_llama} --train-iters 1 --save {out} --save-hf --progress lines")
    assert (out / "hf" / "model.safetensors").is_file()
    exported, trained = open_source(out / "hf"), open_source(out)
    assert all(torch.equal(exported.read(name), trained.read(name)) for name in trained.names())


@pytest.mark.parametrize("flag, times", [("", 1), ("--no-memory-report", 0)])
def test_no_memory_report_leaves_it_out(door, toy_llama, capsys, flag, times):
    door(f"--load {toy_llama} --train-iters 3 --progress lines {flag}")
    shown = capsys.readouterr().out
    assert shown.count("memory of iteration 2, MiB") == shown.count("memory of iteration") == times


@pytest.mark.parametrize("beside", ["", "--async-save --keep-last 1"])
def test_save_hf_each_checkpoint_renews_the_export_beside_training(door, toy_llama, tmp_path, monkeypatch, beside):
    import torch

    from mindspeed_llm.checkpoint.detect import open_source
    from mindspeed_llm.training import hf_export, saving

    monkeypatch.setattr(saving, "EXPORT_SECONDS", 0.05)
    out, seen, export = tmp_path / "out", [], hf_export.export_as_hf

    def watched(plan, quiet=False):
        time.sleep(0.2)  # the next checkpoint is due meanwhile
        newest, target = find_newest(out), export(plan, quiet)
        exported, trained = open_source(target), open_source(newest)
        same = all(torch.equal(exported.read(name), trained.read(name)) for name in trained.names())
        seen.append((newest.name, same, threading.current_thread() is threading.main_thread()))
        return target

    monkeypatch.setattr(hf_export, "export_as_hf", watched)
    flags = f"--load {toy_llama} --train-iters 3 --save {out} --save-interval 1 --progress lines {beside}"
    door(flags, "--save-hf --save-hf-each-checkpoint")
    assert seen == [(f"iter_000000{n}", True, False) for n in (1, 2, 3)]


def test_a_failing_export_ends_the_run_and_leaves_the_checkpoint(door, toy_llama, tmp_path, monkeypatch):
    from mindspeed_llm.training import hf_export

    def failing(plan, quiet=False):
        raise UserError("convert: the disk is full")

    monkeypatch.setattr(hf_export, "export_as_hf", failing)
    flags = f"--load {toy_llama} --train-iters 3 --save {tmp_path} --save-interval 1 --progress lines"
    with pytest.raises(UserError, match="the disk is full"):
        door(flags, "--save-hf --save-hf-each-checkpoint")
    assert find_newest(tmp_path) is not None


def test_what_cannot_be_exported_is_refused_before_training(door, toy_llama, tmp_path):
    with pytest.raises(UserError, match="--save-hf: the base of the adapters is random and nowhere on disk"):
        door(f"--hf-config {toy_llama} --train-iters 1 --save {tmp_path} --save-hf --lora-r 2")
    with pytest.raises(UserError, match="--save-hf-each-checkpoint has a meaning with --save-hf only"):
        door(f"--load {toy_llama} --train-iters 1 --save {tmp_path} --save-hf-each-checkpoint")


def test_show_samples_prints_rows(door, toy_llama, capsys):
    said = []
    for count in (1, 3):
        door(f"--load {toy_llama} --train-iters 1 --show-samples {count} --progress lines")
        # the documents of the corpus repeat a number each
        said.append(len(set(re.findall(r"\b(\d+)(?: \1\b){5}", capsys.readouterr().out))))
    assert said == [1, 3]


def test_progress_is_a_bar_or_lines(door, toy_llama, capsys):
    door(f"--load {toy_llama} --train-iters 1 --progress lines")
    assert "elapsed time per iteration (ms)" in capsys.readouterr().out
    door(f"--load {toy_llama} --train-iters 1 --progress bar")
    assert "elapsed time per iteration (ms)" not in capsys.readouterr().out


def test_log_throughput_adds_to_the_line(door, toy_llama, capsys):
    door(f"--load {toy_llama} --train-iters 1 --log-throughput --progress lines")
    assert "throughput per GPU (TFLOP/s/GPU)" in capsys.readouterr().out
    door(f"--load {toy_llama} --train-iters 1 --progress lines")
    assert "throughput per GPU (TFLOP/s/GPU)" not in capsys.readouterr().out


def test_a_plan_refuses_at_once_what_would_fail_when_the_run_begins(door, toy_llama):
    words = f"--load {toy_llama} --train-iters 4 --dry-run"
    with pytest.raises(UserError) as refused:
        door(words.replace("--load", "--lr-warmup-iters 4 --load"))
    assert str(refused.value).startswith("--lr-warmup-iters 4 does not fit into 4 iterations of decay")
    assert door(f"{words} --lr-warmup-iters 3") is None
    with pytest.raises(UserError, match="--lr-warmup-iters 7 does not fit into 5 iterations of decay.*\n?.*"):
        door(f"{words} --lr-warmup-iters 7 --lr-decay-iters 5")


@pytest.mark.parametrize("split", ["a,b", "0,0", "1,1,1,1", "nan"])
def test_proportions_are_read_with_the_command_line(split):
    from mindspeed_llm.config.parser import parse

    (problem,) = parse("pretrain", ["--split", split]).problems
    assert "--split" in problem and "legal: up to three numbers >= 0" in problem
    assert not parse("pretrain", ["--split", "98,2"]).problems
