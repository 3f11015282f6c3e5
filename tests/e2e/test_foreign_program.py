"""A Megatron program that assumes CUDA trains on a CPU after one import line, and does not without it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).parents[1] / "foreign" / "train_gpt.py"

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


def run(program, processes, *arguments):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, "-W", "ignore", *launcher, str(program), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=dict(os.environ, OMP_NUM_THREADS="1")
    )


def losses(done):
    assert done.returncode == 0, done.stderr[-3000:]
    return [float(value) for value in re.findall(r"loss (\S+)", done.stdout)]


@pytest.mark.slow
def test_it_trains_on_one_process_and_on_two_with_either_kind_of_layer():
    one = losses(run(PROGRAM, 1))
    assert len(one) == 4 and one[-1] < one[0] - 0.1
    two = losses(run(PROGRAM, 2, "--tp", "2", "--impl", "local"))
    assert len(two) == 4 and two[-1] < two[0] - 0.1


@pytest.mark.slow
def test_an_optimizer_that_keeps_its_own_copies_of_parameters_takes_the_same_steps():
    # Where gradients are clipped, megatron rounds them to the buffer's bf16 for the one and computes in fp32 for the
    # other, which moves these losses by 6e-5.
    usual, aware = (losses(run(PROGRAM, 2, "--clip-grad", "0", *more)) for more in ((), ("--precision-aware",)))
    assert len(usual) == 4 and usual[-1] < usual[0] - 0.1
    assert aware == usual


@pytest.mark.slow
def test_without_the_line_it_does_not_run(tmp_path):
    lines = PROGRAM.read_text().splitlines()
    kept = [line for line in lines if not line.startswith("import mindspeed_llm")]
    assert len(kept) == len(lines) - 1
    bare = tmp_path / "train_gpt.py"
    bare.write_text("\n".join(kept))
    done = run(bare, 1)
    assert done.returncode != 0 and "step" not in done.stdout
    assert "NVIDIA" in done.stderr or "CUDA" in done.stderr or "by zero" in done.stderr, done.stderr[-2000:]
