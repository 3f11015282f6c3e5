"""The images cannot be built by the suite: what they copy, install and are started by exists, and each step parses."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
IMAGES = sorted((ROOT / "docker").glob("Dockerfile.*"))
INSTRUCTIONS = ("ARG", "CMD", "COPY", "ENV", "FROM", "RUN", "SHELL", "WORKDIR")
# What the library needs beside its own packages: an editable installation reads these.
NEEDED = {"setup.py", "pyproject.toml", "README.md", "LICENSE", "mindspeed_llm", "patches", "constraints.txt"}


def steps(text):
    """(instruction, rest) of every step, continued lines joined and comments left out."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(None, 1)) for line in joined.splitlines()]


def problems(text):
    """What is wrong with an image."""
    found, known, copied = [], set(), set()
    for instruction, rest in steps(text):
        if instruction not in INSTRUCTIONS:
            found.append(f"unknown instruction {instruction}")
        if instruction == "ARG":
            known.add(rest.split("=")[0])
        if instruction == "ENV":
            known |= {pair.split("=")[0] for pair in shlex.split(rest)}
        if instruction in ("FROM", "COPY"):
            found += [f"{name} is not declared" for name in re.findall(r"\$\{(\w+)", rest) if name not in known]
        if instruction == "COPY":
            *sources, target = rest.split()
            found += [f"{source} does not exist" for source in sources if not list(ROOT.glob(source))]
            copied |= set(sources)
        if instruction == "RUN":
            done = subprocess.run(["bash", "-n", "-c", rest], capture_output=True, text=True)
            found += [done.stderr] if done.returncode else []
            found += [f"{name} is not declared" for name in re.findall(r"\$\{(\w+)", rest) if name not in known]
            found += _of_installation(rest)
    found += [f"{name} is not copied" for name in sorted(NEEDED - copied)]
    return found


def _of_installation(command):
    extras = re.findall(r"--editable '?\.\[([\w,]+)\]", command)
    declared = re.findall(r'"(\w+)": \[', (ROOT / "setup.py").read_text())
    found = [f"extra {e} is not in setup.py" for extra in extras for e in extra.split(",") if e not in declared]
    pins = (ROOT / "constraints.txt").read_text()
    for pattern in re.findall(r"grep '([^']+)' constraints.txt", command):
        found += [] if re.search(pattern, pins, re.M) else [f"constraints.txt has no line {pattern}"]
    return found


def test_there_is_one_for_each_kind_of_device():
    assert [image.suffix for image in IMAGES] == [".cuda", ".npu"]


@pytest.mark.parametrize("image", IMAGES, ids=lambda image: image.name)
def test_what_an_image_names_exists(image):
    assert problems(image.read_text()) == []


@pytest.mark.parametrize("image", IMAGES, ids=lambda image: image.name)
@pytest.mark.parametrize(
    "old, new, said",
    [
        ("COPY patches", "COPY patchez", "patchez does not exist"),
        ("COPY patches ./patches\n", "", "patches is not copied"),
        ("^torch==", "^pytorch==", "constraints.txt has no line"),
        ("${TORCH_INDEX_URL}", "${TORCH_INDEX}", "TORCH_INDEX is not declared"),
        ("RUN python3", "RUN ( python3", "syntax error"),
        ("WORKDIR", "WORKDIRS", "unknown instruction WORKDIRS"),
    ],
)
def test_a_mistake_is_noticed(image, old, new, said):
    text = image.read_text()
    assert old in text
    assert said in "\n".join(problems(text.replace(old, new)))


def test_the_guide_names_the_images_and_how_they_were_checked():
    guide = (ROOT / "docs" / "install.md").read_text()
    assert all(f"docker/{image.name}" in guide for image in IMAGES)
    assert "Neither image could be built" in guide
