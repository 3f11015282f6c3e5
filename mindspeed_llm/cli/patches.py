"""`python -m mindspeed_llm patches list|why|check`: what is changed in megatron-core, where, and against what."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from mindspeed_llm.errors import UserError
from mindspeed_llm.patching import Patch

DISTRIBUTION = "megatron-core"


def list_patches() -> None:
    """Print a row for every patch: name, target, how it changes it, when, and whether it is in force here."""
    from mindspeed_llm import patching
    from mindspeed_llm.patches import catalogue

    _put_in_force()
    in_force = {patch.name for patch in patching.applied()}
    rows = [("name", "target", "kind", "condition", "applied")]
    rows += [
        (patch.name, patch.target, _kind(patch), _condition(patch), "yes" if patch.name in in_force else "no")
        for patch in catalogue()
    ]
    _print_table(rows)


def why(target: str) -> None:
    """Print, for a patch's name or a target, the reason, the fingerprints, and the places that were rebound.

    Raises:
        UserError: no patch has that name or target.
    """
    from mindspeed_llm import patching
    from mindspeed_llm.patches import catalogue

    found = [patch for patch in catalogue() if target in (patch.name, patch.target, *_shorter(patch.target))]
    if not found:
        legal = ", ".join(patch.name for patch in catalogue())
        raise UserError(f"patches why: {target!r} is wrong, because no patch has that name or target; legal: {legal}")
    _put_in_force()
    in_force = {patch.name for patch in patching.applied()}
    for patch in found:
        known = ", ".join(f"{version} {value}" for version, value in patch.fingerprints.items())
        print(patching.why(patch.name) if patch.name in in_force else f"{patch.name} is not in force: {patch.why}")
        print(f"written against: {known}")


def check(version: str | None) -> int:
    """Compare every target with the source it was written against; returns 1 when one changed or is missing.

    Args:
        version: of megatron-core, fetched from the package index and read without being imported; None for the
            installed one.

    Raises:
        UserError: that version cannot be had.
    """
    installed = _installed_root()
    if version is None:
        return _report(importlib.metadata.version(DISTRIBUTION), installed, installed)
    with tempfile.TemporaryDirectory() as folder:
        return _report(version, _fetch(version, Path(folder)), installed)


def _report(version: str, root: Path, reference: Path) -> int:
    from mindspeed_llm.patches import catalogue
    from mindspeed_llm.patching.drift import SAME, drift, has_needs

    concerned = [patch for patch in catalogue() if patch.concerns(version) and has_needs(root, patch)]
    found = drift(concerned, root, reference)
    rows = [("name", "target", version, "fingerprint", "lines")]
    rows += [(each.patch.name, each.patch.target, each.state, each.found or "-", each.summary) for each in found]
    rows += [(patch.name, patch.target, "not concerned", "-", "") for patch in catalogue() if patch not in concerned]
    _print_table(rows)
    different = [each for each in found if each.state != SAME]
    for each in different:
        if each.difference:
            print(f"\n{each.patch.name}: {each.patch.target}\n{each.difference}")
    print(f"\n{len(found) - len(different)} of {len(found)} targets as known")
    return 1 if different else 0


def _installed_root() -> Path:
    """The directory that holds the installed package `megatron`."""
    return Path(importlib.metadata.distribution(DISTRIBUTION).locate_file(""))


def _fetch(version: str, folder: Path) -> Path:
    """The files of a release, unpacked in a folder."""
    requirement = f"{DISTRIBUTION}=={version}"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "-d",
        str(folder),
    ]
    done = subprocess.run([*command, requirement], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise UserError(
            f"patches check: --megatron-core {version} is wrong, because pip cannot fetch {requirement} ({reason}); "
            f"legal: a release that `pip index versions {DISTRIBUTION}` lists"
        )
    with zipfile.ZipFile(wheels[0]) as archive:
        archive.extractall(folder / "files")
    return folder / "files"


def _put_in_force() -> None:
    from mindspeed_llm import accelerator, patches
    from mindspeed_llm.accelerator import torch_facade

    torch_facade.install(accelerator.current())  # before megatron is loaded, which applying does
    patches.apply()


def _kind(patch: Patch) -> str:
    return "replaces" if patch.wrap is None else "wraps"


def _condition(patch: Patch) -> str:
    parts = [f"{DISTRIBUTION} {patch.versions}"] if patch.versions else []
    parts += [f"where {patch.needs} is"] if patch.needs else []
    parts += ["configuration"] if patch.condition is not None else []
    return ", ".join(parts) or "always"


def _shorter(target: str) -> tuple[str, ...]:
    """Other ways to write a target: with a dot before the symbol, or the symbol alone."""
    return target.replace(":", "."), target.split(":")[1]


def _print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
