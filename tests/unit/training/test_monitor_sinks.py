"""Figures reach every sink under the same names, once for every iteration, and no sink ends a training."""

import json
import sys
import types

import pytest

from mindspeed_llm.errors import UserError
from mindspeed_llm.training.monitor.jsonl import JsonLines, read_lines
from mindspeed_llm.training.monitor.saves import SaveEvents
from mindspeed_llm.training.monitor.sinks import Guarded
from mindspeed_llm.training.report import Reporter

TEXT = "--seq-length 64 --lr 1e-3 --global-batch-size 4 --micro-batch-size 2 --split 90,10 --train-iters 2"
# What one iteration of a dense model on a CPU gives, and an evaluation.
NAMES = {
    "lm loss", "grad-norm", "learning-rate", "loss-scale", "batch-size", "iteration-time", "tokens-per-second",
    "samples-per-second", "throughput", "trained-token-share", "consumed-samples", "epoch", "skipped-iterations",
    "skipped-train-samples", "nan-iterations", "mem-resident-bytes",
}  # fmt: skip
VALIDATION = {"lm loss validation", "lm loss validation ppl"}

WANDB = '''
"""A stand-in with the interface that is used, recording every call."""
import enum
calls = []
class AlertLevel(enum.Enum):
    WARN = "WARN"
class Run:
    def __getattr__(self, name):
        return lambda *arguments, **named: calls.append((name, arguments, named))
def init(**named):
    calls.append(("init", (), named))
    return Run()
'''


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """Installed packages wandb and swanlab that only record."""
    folder = tmp_path / "packages"
    folder.mkdir()
    for name in ("wandb", "swanlab"):
        (folder / f"{name}.py").write_text(WANDB)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(folder))
    import swanlab
    import wandb

    yield types.SimpleNamespace(wandb=wandb.calls, swanlab=swanlab.calls)
    for name in ("wandb", "swanlab"):
        sys.modules.pop(name)


def logged(calls, name="log"):
    return [(arguments, named) for called, arguments, named in calls if called == name]


def from_tensorboard(directory):
    """iteration -> {name: value}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory))
    events.Reload()
    found = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            found.setdefault(event.step, {})[name] = event.value
    return found


def metrics(path):
    """iteration -> {name: value}; training and evaluation of an iteration together."""
    found = {}
    for line in read_lines(path):
        if line["kind"] == "metrics":
            values = {k: v for k, v in line.items() if k not in ("kind", "iteration", "time")}
            assert not values.keys() & found.get(line["iteration"], {}).keys(), "an iteration stands there twice"
            found.setdefault(line["iteration"], {}).update(values)
    return found


def test_all_sinks_get_the_same_figures(door, toy_llama, corpus, tmp_path, stand_ins):
    out = tmp_path / "out"
    door(
        "pretrain",
        f"{TEXT} --load {toy_llama} --data-path {corpus} --eval-interval 2 --eval-iters 1 --save {out}",
        f"--tensorboard-dir {tmp_path / 'tb'} --wandb-project p --wandb-exp-name e --wandb-entity us",
        f"--wandb-save-dir {tmp_path / 'w'} --swanlab-project q --swanlab-exp-name f --swanlab-workspace we",
        f"--swanlab-save-dir {tmp_path / 's'}",
    )
    expected = metrics(out / "metrics.jsonl")
    assert expected[1].keys() == NAMES
    assert expected[2].keys() == NAMES | VALIDATION
    board = from_tensorboard(tmp_path / "tb")
    assert board == {step: pytest.approx(values, rel=1e-6) for step, values in expected.items()}
    wandb, swanlab = {}, {}
    for (values,), named in logged(stand_ins.wandb):
        assert not named
        wandb.setdefault(values.pop("iteration"), {}).update(values)
    for (values,), named in logged(stand_ins.swanlab):
        swanlab.setdefault(named["step"], {}).update(values)
    assert wandb == swanlab == expected
    (_, opened), (_, opened_swanlab) = logged(stand_ins.wandb, "init") + logged(stand_ins.swanlab, "init")
    assert (opened["project"], opened["name"], opened["entity"]) == ("p", "e", "us")
    assert opened["dir"] == str(tmp_path / "w")
    assert opened["config"]["training"]["train_iters"] == 2
    assert (opened_swanlab["project"], opened_swanlab["name"], opened_swanlab["workspace"]) == ("q", "f", "we")
    assert opened_swanlab["log_dir"] == str(tmp_path / "s")
    assert len(logged(stand_ins.wandb, "finish")) == len(logged(stand_ins.swanlab, "finish")) == 1


def test_the_metrics_file_stands_where_it_is_asked_for(door, toy_llama, corpus, tmp_path):
    run = f"{TEXT} --load {toy_llama} --data-path {corpus} --eval-iters 0"
    door("pretrain", run, f"--save {tmp_path / 'out'} --metrics-jsonl {tmp_path / 'deep' / 'file'}")
    lines = list(read_lines(tmp_path / "deep" / "file"))
    assert [line["kind"] for line in lines] == ["start", "metrics", "metrics", "memory", "checkpoint"]
    assert lines[0]["train_iters"] == 2
    assert lines[-1]["directory"] == str(tmp_path / "out" / "iter_0000002")
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_a_checkpoint_in_the_background_is_told_of_once_it_is_there(door, toy_llama, corpus, tmp_path):
    run = f"{TEXT} --load {toy_llama} --data-path {corpus} --eval-iters 0 --save-interval 1 --async-save"
    door("pretrain", run, f"--save {tmp_path / 'out'}")
    told = [line for line in read_lines(tmp_path / "out" / "metrics.jsonl") if line["kind"] == "checkpoint"]
    assert [line["directory"] for line in told] == [str(tmp_path / "out" / f"iter_000000{n}") for n in (1, 2)]
    reporter = Reporter(active=True, progress="lines", train_iters=4, done=0, sinks=[JsonLines(tmp_path / "f", 0)])
    events = SaveEvents(reporter)
    events.begun(3, tmp_path / "late")
    assert not (tmp_path / "f").exists()
    (tmp_path / "late").mkdir()
    events.before_batch(None)
    events.before_batch(None)
    assert [line["iteration"] for line in read_lines(tmp_path / "f")] == [3]


def test_a_resumed_run_has_every_iteration_once(door, toy_llama, corpus, tmp_path):
    out = tmp_path / "out"
    run = f"{TEXT} --data-path {corpus} --eval-iters 0 --save {out} --save-interval 2".replace("iters 2", "iters 5")
    door("pretrain", run, f"--load {toy_llama} --exit-interval 3 --tensorboard-dir {tmp_path / 'tb'}")
    first = metrics(out / "metrics.jsonl")
    assert list(first) == [1, 2, 3]
    door("pretrain", run, f"--load {out} --ckpt-step 2 --tensorboard-dir {tmp_path / 'tb'}")
    both = metrics(out / "metrics.jsonl")  # which also says that none is there twice
    assert list(both) == [1, 2, 3, 4, 5]
    assert both[3]["lm loss"] == first[3]["lm loss"]
    assert list(from_tensorboard(tmp_path / "tb")) == [1, 2, 3, 4, 5]
    (superseded,) = [json.loads(x) for x in (out / "metrics.jsonl.superseded").read_text().splitlines() if "lm" in x]
    assert superseded["iteration"] == 3
    assert len([line for line in read_lines(out / "metrics.jsonl") if line["kind"] == "start"]) == 2


def test_a_file_that_is_only_appended_to_would_hold_iterations_twice(tmp_path):
    for _ in range(2):
        sink = JsonLines(tmp_path / "file", done=10)
        for iteration in (1, 2):
            sink.write(iteration, {"lm loss": 1.0})
    with pytest.raises(AssertionError, match="twice"):
        metrics(tmp_path / "file")


def test_a_torn_last_line_is_dropped(tmp_path):
    file = tmp_path / "file"
    sink = JsonLines(file, done=0)
    sink.write(1, {"grad-norm": float("inf"), "lm loss": float("nan")})
    file.write_text(file.read_text() + '{"kind": "metrics", "iteration": 2, "lm lo')
    assert [line["iteration"] for line in read_lines(file)] == [1]
    JsonLines(file, done=5).write(2, {"lm loss": 1.0})
    lines = list(read_lines(file))
    assert [line["iteration"] for line in lines] == [1, 2]
    assert lines[0]["grad-norm"] == float("inf") and lines[0]["lm loss"] != lines[0]["lm loss"]
    for line in file.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_a_rewind_forgets_what_came_later(tmp_path):
    sink = JsonLines(tmp_path / "file", done=0)
    reporter = Reporter(active=True, progress="lines", train_iters=4, done=0, sinks=[sink])
    for iteration in (1, 2, 3):
        reporter.evaluation(iteration, 2.0, 10)
    reporter.rewind(1)
    assert list(metrics(tmp_path / "file")) == [1]
    assert reporter.history.valid == [(1, 2.0)]


class Broken:
    def __init__(self, opens=True):
        if not opens:
            raise ConnectionError("no route to host")

    def __getattr__(self, name):
        def fail(*_):
            raise OSError(28, "No space left on device")

        return fail


def test_a_sink_that_fails_costs_one_warning():
    said = []
    for opens in (True, False):
        sink = Guarded("W&B", lambda opens=opens: Broken(opens), said.append)
        for iteration in range(3):
            sink.write(iteration, {"lm loss": 1.0})
        sink.event("warning", 3, {"text": "x"})
        sink.rewind(1)
        sink.close()
    assert said == [
        "W&B: figures are missing there, training goes on, because OSError: [Errno 28] No space left on device",
        "W&B: nothing is written there, training goes on, because ConnectionError: no route to host",
    ]


def test_a_service_out_of_reach_does_not_end_a_run(door, toy_llama, corpus, stand_ins, monkeypatch, capsys):
    def unreachable(**_):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(sys.modules["wandb"], "init", unreachable)
    run = f"{TEXT} --load {toy_llama} --data-path {corpus} --eval-iters 0 --wandb-project p"
    assert len(door("pretrain", run).history.train) == 2
    assert capsys.readouterr().out.count("warning: W&B: nothing is written there") == 1


@pytest.mark.parametrize("package, flag", [("wandb", "--wandb-project"), ("swanlab", "--swanlab-project")])
def test_a_missing_package_is_named(door, toy_llama, corpus, monkeypatch, package, flag):
    from importlib import util

    monkeypatch.setattr(
        "mindspeed_llm.plan.monitoring.importlib.util.find_spec",
        lambda name, find=util.find_spec: None if name == package else find(name),
    )
    with pytest.raises(
        UserError, match=f"{flag}: p is wrong, because the package {package} is not installed; try: pip"
    ):
        door("pretrain", f"{TEXT} --load {toy_llama} --data-path {corpus} {flag} p")


def test_options_without_a_project_are_refused(door, toy_llama, corpus):
    more = "--wandb-exp-name e --swanlab-save-dir d --straggler-window 5"
    with pytest.raises(UserError) as refused:
        door("pretrain", f"{TEXT} --load {toy_llama} --data-path {corpus} {more}")
    for line in (
        "--wandb-exp-name: no meaning without --wandb-project",
        "--swanlab-save-dir: no meaning without --swanlab-project",
        "--straggler-window: no meaning without --straggler-threshold",
    ):
        assert line in str(refused.value).split("\n")


@pytest.mark.parametrize("package", ["wandb", "swanlab"])
def test_the_real_package_keeps_a_run_offline(door, toy_llama, corpus, tmp_path, monkeypatch, package):
    pytest.importorskip(package)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    run = f"{TEXT} --load {toy_llama} --data-path {corpus} --eval-interval 1 --eval-iters 1 --save {tmp_path / 'out'}"
    door("pretrain", run, f"--{package}-project p --{package}-exp-name e")
    assert [p for p in (tmp_path / "out" / package).rglob("*") if p.is_file() and p.stat().st_size > 1000]
    assert not [line for line in read_lines(tmp_path / "out" / "metrics.jsonl") if line["kind"] == "warning"]
