"""The llama2 recipes and their YAML twins: clean scripts, upstream's names, the same configuration either way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mindspeed_llm.config.parser import parse

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "examples/mcore/llama2").glob("*.sh"))
SCRIPTS = [
    *RECIPES,
    ROOT / "examples/mcore/common.sh",
    ROOT / "scripts/environment.sh",
    ROOT / "quickstart.sh",
    ROOT / "test.sh",
    ROOT / ".ci/run",
]
DOORS = {
    "preprocess_data.py": "preprocess",
    "convert_ckpt.py": "convert",
    "pretrain_gpt.py": "pretrain",
    "posttrain_gpt.py": "posttrain",
    "inference.py": "inference",
}
NAMES = """data_convert_llama2_pretrain data_convert_llama2_instruction ckpt_convert_llama2_hf2mcore
ckpt_convert_llama2_mcore2hf pretrain_llama2_7b_ptd tune_llama2_7b_full_ptd tune_llama2_7b_lora_ptd
generate_llama2_7b_ptd generate_llama2_7b_lora_ptd chat_llama2_7b_ptd""".split()


def recorded_call(
    recipe: Path, tmp_path: Path, *given: str, **environment: str
) -> tuple[str, list[str], dict[str, str]]:
    """(program, its flags, launcher's flags) of a recipe, run with an interpreter that only writes down its words."""
    recorder = tmp_path / "python"
    recorder.write_text('#!/usr/bin/env bash\nprintf "%s\\0" "$@" > "$RECORD"\n')
    recorder.chmod(0o755)
    record = tmp_path / "words"
    clean = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME")}
    subprocess.run(
        ["bash", str(recipe), *given],
        env={**clean, "PYTHON": str(recorder), "RECORD": str(record), "LOG_DIR": str(tmp_path), **environment},
        check=True,
        cwd=ROOT,
    )
    words = record.read_bytes().decode().split("\0")[:-1]
    at = next(i for i, word in enumerate(words) if word in DOORS)
    launcher = words[2:at] if words[:2] == ["-m", "torch.distributed.run"] else []
    return words[at], words[at + 1 :], dict(zip(launcher[::2], launcher[1::2]))


@pytest.mark.parametrize("processes", ["1", "8"])
def test_what_a_recipe_is_given_wins_over_its_own_flags(processes, tmp_path):
    recipe = next(path for path in RECIPES if path.stem == "tune_llama2_7b_lora_ptd")
    _, plain, _ = recorded_call(recipe, tmp_path, NPROC_PER_NODE=processes)
    given = "--lora-target-modules q_proj --prompt-type=chatml --no-sequence-parallel --seed 7 --save a b".split()[:-1]
    given[-1] = "a directory"
    _, words, _ = recorded_call(recipe, tmp_path, *given, NPROC_PER_NODE=processes)
    replaced = "--prompt-type llama2 --save ./ckpt/ --sequence-parallel --lora-target-modules linear_qkv linear_proj "
    gone = [*replaced.split(), "linear_fc1", "linear_fc2"]
    assert set(gone) <= set(plain)
    assert words == [word for word in plain if word not in gone] + given


def test_there_is_a_recipe_and_a_yaml_file_for_every_name():
    assert {p.stem for p in RECIPES} == set(NAMES)
    assert {p.stem for p in (ROOT / "configs/llama2").glob("*.yaml")} == set(NAMES)


def test_shellcheck_finds_nothing():
    shellcheck = Path(sys.executable).parent / "shellcheck"
    result = subprocess.run(
        [str(shellcheck), "-x", "-P", "SCRIPTDIR", *map(str, SCRIPTS)], capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_have_unix_line_ends_and_no_leftover_paths(script):
    text = script.read_bytes()
    assert b"\r" not in text
    assert b"your " not in text


@pytest.mark.parametrize("recipe", [p for p in SCRIPTS if p.name not in ("common.sh", "environment.sh")])
def test_programs_are_executable(recipe):
    assert os.access(recipe, os.X_OK)


@pytest.mark.parametrize("name", NAMES)
def test_recipe_and_yaml_are_the_same_configuration(name, tmp_path):
    program, flags, _ = recorded_call(ROOT / f"examples/mcore/llama2/{name}.sh", tmp_path)
    door = DOORS[program]
    by_flags = parse(door, flags)
    by_yaml = parse(door, ["--config", str(ROOT / f"configs/llama2/{name}.yaml")])
    assert by_flags.problems == [] and by_yaml.problems == []
    assert by_flags.notes == []
    assert by_flags.config.to_json() == by_yaml.config.to_json()
    assert set(by_flags.config.given) == set(by_yaml.config.given)


def test_the_comparison_notices_a_difference(tmp_path):
    _, flags, _ = recorded_call(ROOT / "examples/mcore/llama2/tune_llama2_7b_lora_ptd.sh", tmp_path, LORA_R="8")
    by_yaml = parse("posttrain", ["--config", str(ROOT / "configs/llama2/tune_llama2_7b_lora_ptd.yaml")])
    assert parse("posttrain", flags).config.to_json() != by_yaml.config.to_json()


def test_launcher_gets_hosts_and_processes(tmp_path):
    recipe = ROOT / "examples/mcore/llama2/tune_llama2_7b_full_ptd.sh"
    _, _, launcher = recorded_call(recipe, tmp_path)
    assert launcher["--nproc_per_node"] == "8"
    _, _, launcher = recorded_call(
        recipe, tmp_path, NPROC_PER_NODE="2", NNODES="3", NODE_RANK="1", MASTER_ADDR="host", MASTER_PORT="7000"
    )
    assert launcher == {
        "--nproc_per_node": "2",
        "--nnodes": "3:3",
        "--rdzv_backend": "c10d",
        "--rdzv_endpoint": "host:7000",
        "--rdzv_id": "host:7000",
        "--rdzv_conf": "is_host=0",
        "--max_restarts": "3",
        "--shutdown_timeout": "600",
        "--signals_to_handle": "SIGTERM,SIGINT,SIGUSR1",
    }


def test_arguments_of_a_recipe_reach_its_program_whole(tmp_path):
    script = ROOT / "examples/mcore/llama2/chat_llama2_7b_ptd.sh"
    caller = tmp_path / "call.sh"
    caller.write_text(f'bash {script} --system "two words"\n')
    _, flags, _ = recorded_call(caller, tmp_path)
    assert flags[-2:] == ["--system", "two words"]


def test_a_failing_program_fails_the_recipe(tmp_path):
    failing = tmp_path / "python"
    failing.write_text("#!/usr/bin/env bash\nexit 3\n")
    failing.chmod(0o755)
    for name in ("data_convert_llama2_pretrain", "tune_llama2_7b_lora_ptd"):
        result = subprocess.run(
            ["bash", str(ROOT / f"examples/mcore/llama2/{name}.sh")],
            env={**os.environ, "PYTHON": str(failing), "LOG_DIR": str(tmp_path)},
        )
        assert result.returncode == 3
