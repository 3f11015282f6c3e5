"""The library as a wheel: installed into a folder of its own and used from another one."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow

SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "patches", "mindspeed_llm")


def run(command, **options):
    """stdout of a command that must succeed."""
    result = subprocess.run(command, capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that nothing is left in the working copy."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / "source" / name, symlinks=True, ignore=ignored)
        else:
            (folder / "source").mkdir(exist_ok=True)
            shutil.copy(source, folder / "source" / name)
    flags = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    run([sys.executable, "-m", "pip", "wheel", *flags, "--wheel-dir", str(folder), str(folder / "source")])
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel):
    """A folder for sys.path."""
    target = wheel.parent / "installed"
    flags = ["--no-deps", "--no-index", "--quiet"]
    run([sys.executable, "-m", "pip", "install", *flags, "--target", str(target), str(wheel)])
    return target


def test_every_file_of_the_package_is_in_the_wheel(wheel):
    package = ROOT / "mindspeed_llm"
    folders = [package, package / "patches"]
    files = {p for f in folders for suffix in ("py", "yaml", "csv", "txt") for p in f.rglob(f"*.{suffix}")}
    expected = {str(p.relative_to(ROOT)) for p in files}
    assert {"mindspeed_llm/data/templates.yaml", "mindspeed_llm/config/upstream_flags.csv"} <= expected
    assert "mindspeed_llm/patches/core/utils.py" in expected
    with zipfile.ZipFile(wheel) as archive:
        held = {entry.filename: entry for entry in archive.infolist()}
        assert expected - set(held) == set()
        # a symlink would be stored as a file that holds a path
        assert archive.read("mindspeed_llm/patches/core/utils.py") == (ROOT / "patches/core/utils.py").read_bytes()
    assert not [name for name in held if name.startswith(("tests/", "patches/", "benchmarks/"))]


def elsewhere(installed, folder, *words):
    """stdout of `python ...` in a folder from which the working copy cannot be seen."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["PYTHONPATH"] = str(installed)
    return run([sys.executable, *words], cwd=folder, env=environment)


def test_it_runs_from_another_folder(installed, tmp_path):
    where = elsewhere(installed, tmp_path, "-c", "import mindspeed_llm; print(mindspeed_llm.__file__)")
    assert Path(where.strip()).is_relative_to(installed)
    assert "qwen2" in elsewhere(installed, tmp_path, "-m", "mindspeed_llm", "models", "list")
    assert "megatron.core" in elsewhere(installed, tmp_path, "-m", "mindspeed_llm", "patches", "list")
    code = "from mindspeed_llm.cli.preprocess import main; raise SystemExit(main(['--help']))"
    assert "--prompt-type" in elsewhere(installed, tmp_path, "-c", code)


def test_the_version_is_one_fact(wheel):
    import mindspeed_llm

    assert wheel.name.split("-")[1] == mindspeed_llm.__version__


def test_data_files_are_readable_where_they_are_installed(installed, tmp_path):
    code = (
        "from mindspeed_llm.config.upstream import upstream_flags; from mindspeed_llm.data import templates; "
        "print(len(upstream_flags()), templates.__file__)"
    )
    count, file = elsewhere(installed, tmp_path, "-c", code).split()
    assert int(count) > 50
    assert (Path(file).parent / "templates.yaml").is_file()
