"""A device that is full: torch_npu's own refusal, what a run says of it, and that what it advises does fit."""

import os
import re
import subprocess
import sys

import pytest

from mindspeed_llm.checkpoint.toy import make_toy

# The layers save about 90 MiB, which this device does not have beside the rest.
DEVICE_MB = 104
WORDS = "--train-iters 2 --lr 1e-3 --global-batch-size 16 --micro-batch-size 16 --seq-length 128 --split 100"
WORDS += " --eval-iters 0 --progress lines --num-threads 1"
DOOR = "import simulator, sys; simulator.start(); from mindspeed_llm.cli import pretrain; sys.exit(pretrain.main())"
CHANGE = re.compile(r"(?:try: |; or )(--.*?) \(saves about ([\d.]+) MiB")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    directory = tmp_path_factory.mktemp("job")
    model = make_toy("llama", directory / "llama", num_hidden_layers=8, intermediate_size=256, initializer_range=0.02)
    (directory / "text.jsonl").write_text('{"text": "%s"}\n' % ("a b c d " * 800) * 8)
    return f"{WORDS} --load {model} --data-path {directory / 'text.jsonl'}", str(directory / "cache")


def trained(words, more=""):
    """A training in a process of its own, on a device of that size; `more` takes the place of what is there."""
    before = words[0]
    for flag in re.findall(r"--\S+", more):
        before = re.sub(rf"{flag} \S+", "", before)
    return subprocess.run(
        [sys.executable, "-c", DOOR, *f"{before} {more}".split()],
        env=os.environ | {"ASCEND_SIMULATOR_MEMORY_MB": str(DEVICE_MB), "MINDSPEED_LLM_CACHE": words[1]},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def refused(words):
    return trained(words)


def last_error(done):
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: out of memory: ")]
    return line


def test_the_refusal_is_explained_in_one_line(refused):
    assert refused.returncode == 1, refused.stdout + refused.stderr
    said = re.match(
        r"error: out of memory: rank 0 asked for \S+ MiB more when (\S+) MiB of (\S+) MiB were taken",
        last_error(refused),
    )
    assert said and DEVICE_MB / 2 < float(said[1]) < float(said[2]) <= DEVICE_MB
    assert re.search(r"together +[\d.]+ +[\d.]+ ", refused.stderr)  # the allocator's own peak stands in the report
    assert "Traceback" not in refused.stderr


def test_what_is_advised_fits_into_the_same_device(words, refused):
    changes = CHANGE.findall(last_error(refused))
    assert 1 <= len(changes) <= 3
    # The least that is advised is the one that could be too little.
    least, _ = min(changes, key=lambda change: float(change[1]))
    done = trained(words, least)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "iteration        2/       2" in done.stdout


def test_what_saves_less_than_is_advised_does_not_fit(words, refused):
    """The test above would see advice that is too small."""
    assert "--recompute-norm" not in [change for change, _ in CHANGE.findall(last_error(refused))]
    done = trained(words, "--recompute-norm")
    assert done.returncode == 1 and last_error(done)
