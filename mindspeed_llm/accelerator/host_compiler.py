"""Whether this machine has the C++ compiler that torch.compile needs for kernels of a CPU."""

from __future__ import annotations

import os
import shutil

# What torch calls when CXX names nothing (torch._inductor.config.cpp.cxx).
DEFAULT_COMPILER = "g++"


def compiler() -> str:
    """The command that compiles."""
    return os.environ.get("CXX", DEFAULT_COMPILER)


def why_not() -> str | None:
    """Why nothing can be compiled here; None when it can."""
    return None if shutil.which(compiler()) else f"it needs a C++ compiler, and there is no {compiler()} on PATH"


def describe() -> str:
    """Whether --compile-operators can be had."""
    reason = why_not()
    return (
        f"--compile-operators cannot be had: {reason}" if reason else f"--compile-operators compiles with {compiler()}"
    )
