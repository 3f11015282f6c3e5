"""Triton's kernels without a GPU: interpreted on a CPU, and compiled for devices that are not here.

Each file of `cases/` runs in a process with Triton in a folder of its own. It is not in the environment of the other
tests: megatron-core takes its own kernels' side where it finds Triton, and a CUDA build of torch brings a version that
no constraint of ours may contradict. Where it cannot be installed these tests are skipped, saying why; under CI=true
that is a failure.
"""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from mindspeed_llm.testing.side_packages import Missing, install_beside, once

TRITON = "3.9.0"
HERE = Path(__file__).parent
CASES = sorted((HERE / "cases").glob("test_*.py"))


def provide() -> Path:
    """The folder with Triton.

    Raises:
        Missing: there is none for this machine.
    """
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
        raise Missing(f"Triton has no wheel for {platform.system()} on {platform.machine()}")
    return install_beside("triton", TRITON)


@pytest.fixture(scope="session")
def variables():
    """Environment of a process that finds Triton; compiled kernels are kept."""
    try:
        site = provide()
    except Missing as reason:
        if os.environ.get("CI", "").lower() == "true":
            pytest.fail(f"Triton's kernels must be tested in CI: {reason}")
        pytest.skip(f"no Triton: {reason}")
    paths = [str(site), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "TRITON_CASES": "1",
        "TRITON_CACHE_DIR": str(once(f"triton-{TRITON}-compiled", lambda folder: None)),
        # What Triton does by default; it warns as long as nobody says so.
        "TRITON_DEFAULT_FP_FUSION": "1",
    }


@pytest.mark.slow
@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_kernels(path, variables):
    if path.stem == "test_interpreted":
        variables = {**variables, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
    done = subprocess.run(command, cwd=HERE.parents[1], env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_a_machine_without_triton_is_told_so(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(Missing, match="riscv64"):
        provide()
