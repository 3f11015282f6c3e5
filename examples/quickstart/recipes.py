"""Run recipes' programs inside this process: a demonstration of many small steps should not pay for many starts.

What is run is exactly what the recipe says: the recipe itself is executed with an interpreter that prints its words.

    python examples/quickstart/recipes.py NAME [VARIABLE=VALUE ...] [FLAG ...] [then NAME ...]
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = {
    "preprocess_data.py": "preprocess",
    "convert_ckpt.py": "convert",
    "pretrain_gpt.py": "pretrain",
    "posttrain_gpt.py": "posttrain",
    "inference.py": "inference",
}


def words_of_recipe(name: str, variables: Mapping[str, str], flags: Sequence[str] = ()) -> list[str]:
    """What `examples/mcore/llama2/NAME.sh FLAGS` runs with these environment variables: WORLD_SIZE, program, flags."""
    result = subprocess.run(
        ["bash", str(ROOT / f"examples/mcore/llama2/{name}.sh"), *flags],
        env={**os.environ, **variables, "PYTHON": str(ROOT / "examples/quickstart/print_words.sh")},
        stdout=subprocess.PIPE,
        check=True,
    )
    return result.stdout.decode().split("\0")[:-1]


def run_recipe(name: str, variables: Mapping[str, str], flags: Sequence[str] = ()) -> None:
    """Do in this process what a one-process recipe (or a dry run) does in its own; note its seconds.

    Raises:
        SystemExit: the program failed.
    """
    world_size, program, *words = words_of_recipe(name, variables, flags)
    print(f"\n$ {'DRY_RUN=1 ' if '--dry-run' in words else ''}bash {name}.sh", flush=True)
    start = time.monotonic()
    door = importlib.import_module(f"mindspeed_llm.cli.{PROGRAMS[program]}")
    os.environ["WORLD_SIZE"] = world_size
    if status := door.main(words):
        raise SystemExit(status)
    note_stage(name, time.monotonic() - start)


def note_stage(name: str, seconds: float) -> None:
    """Add a line to the table of stages that quickstart.sh prints at the end."""
    if stages := os.environ.get("STAGES"):
        with open(stages, "a", encoding="utf-8") as file:
            file.write(f"{seconds:.1f}\t{name}\n")


def main(argv: Sequence[str]) -> None:
    """Run the recipes named on the command line one after another."""
    calls: list[list[str]] = [[]]
    for word in argv:
        if word == "then":
            calls.append([])
        else:
            calls[-1].append(word)
    for name, *rest in calls:
        variables = dict(word.split("=", 1) for word in rest if "=" in word and not word.startswith("--"))
        run_recipe(name, variables, [word for word in rest if "=" not in word or word.startswith("--")])


if __name__ == "__main__":
    main(sys.argv[1:])
