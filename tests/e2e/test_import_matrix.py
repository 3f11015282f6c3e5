"""Whatever optional packages are there, absent, unloadable or others of the same name: a CPU trains to the same losses.

Each state is an environment of its own in a process of its own, with packages of `import_matrix_packages` on PYTHONPATH
and no compiler on PATH. What a flag asks for and the environment lacks is refused in one line.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mindspeed_llm.checkpoint.toy import make_toy

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def _load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


packages = _load("import_matrix_packages")

# Opens the door for each command line of the list in argv[1], and prints the exit status of each.
DRIVER = """
import json, os, sys
from mindspeed_llm.cli.pretrain import main
for words in json.loads(sys.argv[1]):
    try:
        status = main(words)
    except SystemExit as leaving:
        status = leaving.code
    sys.stderr.flush()
    os.environ.pop("MINDSPEED_LLM_DEVICE", None)  # what --device of this line means for processes of its run
    print(f"[status {status}]", flush=True)
"""

STATES = {
    "another apex, flash_attn and liger_kernel without CUDA": {
        **packages.ANOTHER_APEX,
        **packages.FLASH_ATTENTION,
        **packages.LIGER_KERNEL,
    },
    "apex": packages.APEX,
    "transformer_engine": packages.TRANSFORMER_ENGINE,
    "transformer_engine that cannot be loaded, torch_npu without CANN": {
        **packages.UNLOADABLE_TRANSFORMER_ENGINE,
        **packages.TORCH_NPU,
    },
}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Two steps of a tiny model."""
    folder = tmp_path_factory.mktemp("matrix")
    (folder / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"{i} and then some words"}) + "\n" for i in range(40))
    )
    model = make_toy("llama", folder / "llama", num_hidden_layers=2)
    text = "--train-iters 2 --lr 1e-3 --global-batch-size 2 --micro-batch-size 1 --seq-length 32 --eval-iters 0 "
    text += f"--split 1,0 --load {model} --data-path {folder / 'text.jsonl'} --progress lines --num-threads 1 --bf16"
    return text.split()


def opened(files, command_lines, folder):
    """Output of the door in an environment with these packages."""
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content)
    known = {name: os.environ[name] for name in ("HOME", "XDG_CACHE_HOME", "LANG", "TMPDIR") if name in os.environ}
    environment = {
        **known,
        "PATH": str(folder),  # no compiler, and nothing else
        "PYTHONPATH": os.pathsep.join((str(folder), str(ROOT))),
        "OMP_NUM_THREADS": "1",
        "MINDSPEED_LLM_CACHE": str(folder / "cache"),
    }
    command = [sys.executable, "-W", "ignore", "-c", DRIVER, json.dumps(command_lines)]
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240, env=environment, cwd=folder
    )


def losses(done):
    found = re.findall(r"lm loss: (\S+)", done.stdout)
    assert done.returncode == 0 and len(found) == 2, done.stdout[-3000:]
    return found


def refusals(done):
    """What was said to each command line, the status being 1."""
    *said, rest = re.split(r"\[status 1\]\n", done.stdout)
    assert rest == "" and done.returncode == 0, done.stdout[-3000:]
    return said


@pytest.fixture(scope="module")
def bare(words, tmp_path_factory):
    """What the door prints with none of the packages."""
    return losses(opened({}, [words], tmp_path_factory.mktemp("bare")))


@pytest.mark.parametrize("state", STATES)
def test_two_steps_are_the_same(state, words, bare, tmp_path):
    assert losses(opened(STATES[state], [words], tmp_path)) == bare


# Flags that ask for what is missing, and what is said, without the packages and with torch_npu that lacks CANN.
ASKING = {
    "--device npu": ("torch_npu is not installed", "torch_npu cannot be loaded (libhccl.so: cannot open shared object"),
    "--device cuda": ("torch sees no CUDA device",) * 2,
    "--use-ascend-mc2": ("needs an Ascend NPU, and the device is cpu",) * 2,
    "--compile-operators": ("it needs a C++ compiler, and there is no g++ on PATH; try: --no-compile-operators",) * 2,
    "--npu-deterministic": ("needs an Ascend NPU, and the device is cpu",) * 2,
}


@pytest.mark.parametrize("number, files", enumerate(({}, packages.TORCH_NPU)), ids=["absent", "without CANN"])
def test_a_flag_that_asks_for_what_is_missing_is_refused_in_one_line(number, files, words, tmp_path):
    said = refusals(opened(files, [[*words, *flag.split()] for flag in ASKING], tmp_path))
    for flag, lines in zip(ASKING, said, strict=True):
        assert "Traceback" not in lines and ASKING[flag][number] in " ".join(lines.split()), (flag, lines)
