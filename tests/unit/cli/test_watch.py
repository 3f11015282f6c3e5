"""`python -m mindspeed_llm watch`: a real run's metrics file as text and as a picture, and what is said of one."""

import json
import pydoc_data.topics
import time

import pytest

from mindspeed_llm.__main__ import main
from mindspeed_llm.cli import watch
from mindspeed_llm.config.parser import parse

# Lines of an hour's run: an iteration a minute, the learning rate falling, one overflow.
BEGUN = 1_800_000_000.0


@pytest.fixture(scope="module")
def run(toy_llama, tmp_path_factory):
    """The --save directory of a real run of three iterations."""
    from mindspeed_llm.cli.training import run_door

    root = tmp_path_factory.mktemp("watched")
    topics = pydoc_data.topics.topics
    (root / "text.jsonl").write_text("".join(json.dumps({"text": topics[k][:900]}) + "\n" for k in sorted(topics)[:30]))
    words = (
        f"--load {toy_llama} --data-path {root / 'text.jsonl'} --save {root / 'out'} --train-iters 3 --lr 1e-3 "
        "--seq-length 64 --split 90,10 --eval-iters 1 --eval-interval 3 --progress lines"
    )
    run_door(parse("pretrain", words.split()))
    return root / "out"


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def metrics(iteration, **more):
    figures = {"lm loss": 5.0 - iteration / 20, "grad-norm": 1.0, "learning-rate": 1e-3, "tokens-per-second": 1234.0}
    return {"kind": "metrics", "iteration": iteration, "time": BEGUN + 60 * iteration, **figures, **more}


@pytest.fixture
def hour(tmp_path):
    start = {"kind": "start", "iteration": 0, "time": BEGUN, "train_iters": 100}
    checkpoint = {"kind": "checkpoint", "iteration": 30, "time": BEGUN + 1800, "directory": "somewhere"}
    warning = {"kind": "warning", "iteration": 50, "time": BEGUN + 3000, "text": "straggler: rank 3 on host-b"}
    return write(
        tmp_path / "metrics.jsonl",
        start,
        *(metrics(n) for n in range(1, 60)),
        checkpoint,
        warning,
        metrics(60, **{"grad-norm": "inf", "skipped-iterations": 1.0}),
    )


def facts(path, now):
    return dict(watch.summary(watch.read_run(str(path)), now))


def test_a_finished_run_is_shown_as_text(run, capsys):
    assert main(["watch", str(run), "--once"]) == 0
    text = capsys.readouterr().out
    last = [
        line for line in (json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()) if "lm loss" in line
    ]
    for part in (
        "finished", "3 of 3 (100.0 %)", f"{last[-1]['lm loss']:.4f}", "validation loss", "at iteration 3",
        "checkpoint          iteration 3, ", "gradient norm", "learning rate", "tokens/s", "host memory",
    ):  # fmt: skip
        assert part in text, part
    assert any(0x2800 < ord(letter) < 0x2900 for letter in text), "no curve"
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text


def test_without_a_terminal_it_prints_and_exits(run, capsys):
    assert main(["watch", str(run / "metrics.jsonl")]) == 0
    assert "3 of 3" in capsys.readouterr().out


def test_the_picture_shows_the_curves(run, tmp_path):
    from matplotlib import image

    assert main(["watch", str(run), "--png", str(tmp_path / "deep" / "curves.png")]) == 0
    drawn = image.imread(tmp_path / "deep" / "curves.png")[..., :3]
    empty = tmp_path / "empty.png"
    watch.draw(watch.RunView(), empty)
    blank = image.imread(empty)[..., :3]
    blue, orange = (abs(drawn - color).max(axis=-1) < 0.05 for color in ((0.122, 0.467, 0.706), (1.0, 0.498, 0.055)))
    rows, columns = drawn.shape[0] // 2, drawn.shape[1] // 2
    for top in (slice(0, rows), slice(rows, None)):
        for left in (slice(0, columns), slice(columns, None)):
            assert blue[top, left].sum() > 50, "a curve is missing"
    assert orange.sum() > 10, "the validation loss is missing"
    assert (abs(blank - (0.122, 0.467, 0.706)).max(axis=-1) < 0.05).sum() == 0


def test_what_is_said_of_a_running_job(hour):
    said = facts(hour, BEGUN + 60 * 60 + 30)
    assert said["state"] == "running"
    assert said["iteration"] == "60 of 100 (60.0 %)"
    assert said["time left"].startswith("40 min, until 20")
    assert said["gradient norm"] == "inf"
    assert said["skipped iterations"] == "1"
    assert said["checkpoint"] == "iteration 30, 30 min ago"


def test_a_job_that_fell_silent_is_called_so(hour):
    assert facts(hour, BEGUN + 3600 + 9 * 60)["state"] == "running"
    assert facts(hour, BEGUN + 3600 + 3 * 3600)["state"] == "silent for 3 h 0 min: no log line came"


def test_a_restart_does_not_slow_the_estimate(tmp_path):
    again = {"kind": "start", "iteration": 10, "time": BEGUN + 86400, "train_iters": 100}
    late = [{**metrics(n), "time": BEGUN + 86400 + 60 * n} for n in (11, 12)]
    path = write(tmp_path / "file", *(metrics(n) for n in range(1, 11)), again, *late)
    view = watch.read_run(str(path))
    assert view.seconds_per_iteration() == pytest.approx(60)
    assert view.seconds_left() == pytest.approx(88 * 60)


def test_a_run_that_has_said_nothing_yet(tmp_path, capsys):
    path = write(tmp_path / "metrics.jsonl", {"kind": "start", "iteration": 0, "time": time.time(), "train_iters": 9})
    assert facts(path, time.time())["state"] == "no log line yet"
    assert main(["watch", str(tmp_path), "--once"]) == 0
    assert "0 of 9" in capsys.readouterr().out


def test_warnings_are_shown(hour, capsys):
    main(["watch", str(hour), "--once"])
    assert "warning at iteration 50: straggler: rank 3 on host-b" in capsys.readouterr().out


def test_a_place_without_a_run_is_refused(tmp_path, capsys):
    assert main(["watch", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert said.startswith(
        f"error: watch: {tmp_path} is wrong, because there is no file {tmp_path}/metrics.jsonl; legal:"
    )


def test_a_curve_rises_and_falls_where_the_figures_do():
    up, down = watch.chart([(0, 0.0), (9, 1.0)], 10, 3), watch.chart([(0, 1.0), (9, 0.0)], 10, 3)
    assert up[0].strip() and not up[0][:3].strip() and up[-1][0] != " "
    assert [row[0] != " " for row in down] == [True, False, False]
    assert watch.chart([(1, float("nan"))], 4, 2) == ["    ", "    "]
    gap = watch.chart([(0, 0.0), (1, float("inf")), (2, 1.0)], 4, 2)
    assert any(letter != " " for row in gap for letter in row)


@pytest.mark.parametrize(
    "seconds, text", [(4.9, "4 s"), (200, "3 min"), (7800, "2 h 10 min"), (360000, "4 d 4 h"), (-3, "0 s")]
)
def test_durations(seconds, text):
    assert watch.duration(seconds) == text
