"""Everything on the simulated NPU: each file of `cases/` in a process with torch_npu and the simulator's libraries.

Where the simulator cannot be built its tests are skipped, saying why; under CI=true that is a failure.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CASES = sorted((HERE / "cases").glob("test_*.py"))


def _load_build():
    spec = importlib.util.spec_from_file_location("ascend_simulator_build", HERE / "simulator" / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


build = _load_build()


@pytest.fixture(scope="session")
def variables():
    """Environment of a process on the simulated device."""
    try:
        made = build.build()
    except build.CannotSimulate as reason:
        if os.environ.get("CI", "").lower() == "true":
            pytest.fail(f"the Ascend simulator must run in CI: {reason}")
        pytest.skip(f"no Ascend simulator: {reason}")
    return {**os.environ, **build.environment(made)}


@pytest.mark.slow
@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_on_the_simulated_device(path, variables):
    if path.stem.endswith("_lazy"):
        variables = {**variables, "ASCEND_SIMULATOR_LAZY": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
    done = subprocess.run(command, cwd=HERE.parents[1], env=variables, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_a_machine_without_a_compiler_is_told_what_is_missing(monkeypatch):
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with pytest.raises(build.CannotSimulate, match="gcc"):
        build.build()


def test_a_cuda_build_of_torch_is_told_apart(monkeypatch):
    import torch

    monkeypatch.setattr(torch.version, "cuda", "12.8")
    with pytest.raises(build.CannotSimulate, match="CUDA build"):
        build.build()
