"""Packages that some tests need and that must not be in the environment of the others, in folders of their own."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


class Missing(Exception):
    """What this machine lacks, in one line."""


def once(name: str, fill: Callable[[Path], None]) -> Path:
    """The folder of that name in the cache beside CI's environments, filled if it is not there."""
    made = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mindspeed_llm" / name
    if made.exists():
        return made
    aside = made.with_name(f"{name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        fill(aside)
        aside.rename(made)
    except OSError:
        if not made.exists():  # else another process was faster
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return made


def install_beside(package: str, version: str) -> Path:
    """The folder that holds a package for this interpreter, without what it requires.

    Raises:
        Missing: pip could not.
    """

    def fill(site: Path) -> None:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site)]
        done = subprocess.run([*command, f"{package}=={version}"], capture_output=True, text=True)
        if done.returncode:
            reason = done.stderr.strip() or f"exit code {done.returncode}"
            raise Missing(f"pip could not install {package} {version}: {reason.splitlines()[-1]}")

    return once(f"{package}-{version}-{sys.implementation.cache_tag}-{platform.machine()}", fill)
