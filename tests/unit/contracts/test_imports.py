"""Who imports whom, and what importing the package costs."""

import configparser
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mindspeed_llm.config.schema import DOORS

ROOT = Path(__file__).parents[3]
HEAVY = ("torch", "megatron", "transformers", "numpy", "datasets", "peft")


def lint(root):
    """Exit status and text of import-linter on the package in `root`."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()", "--no-cache"]
    environment = {**os.environ, "PYTHONPATH": str(root), "COLUMNS": "200"}
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    return result.returncode, result.stdout + result.stderr


def test_imports_point_down():
    status, text = lint(ROOT)
    assert status == 0, text
    assert f"{sum(s.startswith('importlinter:contract:') for s in contracts().sections())} kept, 0 broken" in text


def contracts():
    """The committed contracts."""
    file = configparser.ConfigParser()
    file.read(ROOT / ".importlinter")
    return file


VIOLATIONS = {
    "models/norm.py": "from mindspeed_llm.training import loop",
    "config/schema.py": "import torch",
    "data/packing.py": "def late():\n    import megatron.core",
    "models/families/llama.py": "import torch",
    "patching/patch.py": "import mindspeed_llm.patches",
    "lora/io.py": "import mindspeed_llm.memory",
}


def test_the_contracts_notice_violations(tmp_path):
    shutil.copytree(ROOT / "mindspeed_llm", tmp_path / "mindspeed_llm", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / ".importlinter", tmp_path)
    assert lint(tmp_path)[0] == 0
    for name, line in VIOLATIONS.items():
        file = tmp_path / "mindspeed_llm" / name
        file.write_text(file.read_text() + f"\n\n{line}\n")
    status, text = lint(tmp_path)
    assert status == 1
    for said in (
        "mindspeed_llm.models.norm -> mindspeed_llm.training",
        "mindspeed_llm.config.schema -> torch",
        "mindspeed_llm.data.packing -> megatron",
        "mindspeed_llm.models.families.llama -> torch",
        "mindspeed_llm.patching.patch -> mindspeed_llm.patches",
        "mindspeed_llm.lora.io -> mindspeed_llm.memory",
    ):
        assert said in text, said


def loaded_by(code):
    """Top-level names of the heavy packages that a fresh interpreter has loaded after `code`, and how many modules."""
    report = f"import sys; print(sorted(set({HEAVY}) & {{m.split('.')[0] for m in sys.modules}}), len(sys.modules))"
    result = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    packages, count = result.stdout.splitlines()[-1].rsplit(" ", 1)
    return packages, int(count)


@pytest.fixture(scope="module")
def bare_interpreter():
    return loaded_by("pass")[1]


def test_importing_the_package_loads_nothing_heavy(bare_interpreter):
    packages, count = loaded_by("import mindspeed_llm")
    assert packages == "[]"
    assert count - bare_interpreter < 20


@pytest.mark.parametrize("door", DOORS)
def test_help_loads_nothing_heavy(door, bare_interpreter):
    packages, count = loaded_by(f"from mindspeed_llm.cli.{door} import main; assert main(['--help']) == 0")
    assert packages == "[]"
    # torch alone would be over a thousand
    assert count - bare_interpreter < 250


def test_help_of_the_small_tools_loads_nothing_heavy(bare_interpreter):
    call = "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert not end.code"
    code = f"from mindspeed_llm.__main__ import main\n{call}"
    packages, count = loaded_by(code)
    assert packages == "[]"
    assert count - bare_interpreter < 250


def test_preprocessing_and_conversion_do_not_load_megatron():
    code = "import mindspeed_llm.data.preprocess, mindspeed_llm.checkpoint.convert, mindspeed_llm.lora.merge"
    assert "megatron" not in loaded_by(code)[0]


def test_torch_would_be_noticed():
    assert loaded_by("import torch")[0] == "['numpy', 'torch']"


@pytest.mark.parametrize("script", sorted(p.name for p in ROOT.glob("*.py") if p.name != "setup.py"))
def test_a_door_does_nothing_when_it_is_imported(script):
    packages, _ = loaded_by(f"import runpy; runpy.run_path({script!r}, run_name='imported')")
    assert packages == "[]"
