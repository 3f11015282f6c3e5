"""Runs under a real torchrun: a rank that was started differently, one that fails, and one that is late are named."""

import json
import os
import pydoc_data.topics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = "--train-iters 4 --global-batch-size 2 --micro-batch-size 1 --seq-length 64 --eval-iters 0 --progress lines"
# What each rank does before it opens the door of posttrain_gpt.py.
PRELUDE = """
import os, sys, time
sys.path.insert(0, {root!r})
rank = int(os.environ["RANK"])
{body}
if __name__ == "__main__":
    from mindspeed_llm.cli.posttrain import main
    sys.exit(main())
"""
OTHER_RATE = "if rank == 1: sys.argv += ['--weight-decay', '0.5']"
FAILING = """
from mindspeed_llm.training.loop import TrainingLoop
step = TrainingLoop.step
def failing(self):
    if rank == 1 and self.progress.iteration == 2:
        raise OSError('disk is full')
    return step(self)
TrainingLoop.step = failing
"""
LATE = """
from mindspeed_llm.parallel import watch
watch.LATE_SHARE = 0.002  # of ten minutes
from mindspeed_llm.training.data import TrainingData
original = TrainingData.micro_batches
def slow_storage(self, consumed, *rest):
    if rank == 1 and consumed == 2:
        time.sleep(8)
    return original(self, consumed, *rest)
TrainingData.micro_batches = slow_storage
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    topics = pydoc_data.topics.topics
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    rows = [{"instruction": n, "input": "", "output": " ".join(topics[n].split()[:8])} for n in sorted(topics)[:12]]
    path.write_text(json.dumps(rows))
    return path


def torchrun(directory, body, model, rows, more=""):
    """(exit status, stderr) of two ranks."""
    script = directory / "door.py"
    script.write_text(PRELUDE.format(root=str(ROOT), body=body))
    words = f"{FLAGS} --prompt-type chatml --load {model} --data-path {rows} {more}"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "MINDSPEED_LLM_CACHE": str(rows.parent / "cache"), "MINDSPEED_LLM_DEVICE": "cpu"}
    done = subprocess.run(
        [*command, *words.split()], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    return done.returncode, done.stderr


def test_a_rank_with_another_flag_is_named_before_a_model_is_built(toy_llama, rows, tmp_path):
    status, said = torchrun(tmp_path, OTHER_RATE, toy_llama, rows)
    assert status != 0
    assert "--weight-decay is 0.5 there and 0.01 elsewhere" in said or "--weight-decay is 0.01 there and 0.5" in said
    assert "launch: rank " in said and "loaded" not in said


def test_the_first_failing_rank_and_its_message_are_named(toy_llama, rows, tmp_path):
    status, said = torchrun(tmp_path, FAILING, toy_llama, rows)
    assert status != 0
    assert "error: rank 1 on " in said and "failed first: OSError: disk is full" in said
    # The launcher's own summary has the message too.
    assert "OSError: disk is full" in said[said.index("Root Cause") :]


def test_a_late_rank_is_named_with_its_place_in_the_code(toy_llama, rows, tmp_path):
    status, said = torchrun(tmp_path, LATE, toy_llama, rows)
    assert status == 0, said
    (line,) = [line for line in said.split("\n") if line.startswith("late: ") and "slow_storage" in line]
    assert "1 of 2 ranks wait for rank 1 on " in line
