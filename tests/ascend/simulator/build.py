"""Where the simulator lives: torch_npu's wheel in a folder of its own, and stand-ins of CANN's libraries beside it.

    python tests/ascend/simulator/build.py      makes it if needed and prints the variables for a process on the device

Nothing is installed into the environment that runs this: with torch_npu on the path and CANN absent, `import torch`
fails in every process that does not set TORCH_DEVICE_BACKEND_AUTOLOAD=0. `environment` shows both to a process.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from mindspeed_llm.testing.side_packages import Missing as CannotSimulate
from mindspeed_llm.testing.side_packages import install_beside, once

# The release whose wheel runs unchanged, for torch of the same minor version (docs/install.md has the whole table).
TORCH_NPU = "2.13.0"
SOURCES = Path(__file__).with_name("cann")
# Names by which the wheel asks for CANN: AscendCL, the runtime, the profiler, the transformer boost library.
CANN_SYMBOL = re.compile(r"\b(acl[A-Za-z]\w+|rt[A-Z]\w+|Msprof\w+|_ZN3atb\w+)\b")
EMPTY_LIBRARIES = ("libhccl.so", "libge_runner.so", "libgraph.so", "libacl_tdt_channel.so")
LIBRARIES = ("libascendcl.so", "libacl_op_compiler.so", *EMPTY_LIBRARIES)


@dataclass(frozen=True)
class Simulator:
    """Folders of the unpacked wheel and of the libraries, in the cache beside CI's environments."""

    site: Path
    lib: Path


def build() -> Simulator:
    """The simulator of this interpreter, wheel and sources, made if it does not exist.

    Raises:
        CannotSimulate: naming what is missing.
    """
    _check_machine()
    python = f"{sys.implementation.cache_tag}-{platform.machine()}"
    site = install_beside("torch_npu", TORCH_NPU)
    return Simulator(site, once(f"ascend-{python}-{_hash()}", lambda lib: _build_libraries(site, lib)))


def environment(made: Simulator) -> dict[str, str]:
    """Variables under which a process finds the wheel and the libraries."""
    paths = [str(made.site), str(SOURCES.parents[1]), os.environ.get("PYTHONPATH", "")]
    return {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "LD_LIBRARY_PATH": str(made.lib),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        # Kernels here read memory when they are called; torch_npu's queue would still be copying then.
        "TASK_QUEUE_ENABLE": "0",
        # Segments that grow are not simulated.
        "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:False",
        "MINDSPEED_LLM_DEVICE": "npu",
        "ASCEND_SIMULATOR": "1",
    }


def _check_machine() -> None:
    import torch

    if shutil.which("gcc") is None or shutil.which("nm") is None:
        raise CannotSimulate("gcc or nm is not installed: CANN's libraries cannot be built")
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
        raise CannotSimulate(f"torch_npu has no wheel for {platform.system()} on {platform.machine()}")
    if torch.version.cuda is not None:
        raise CannotSimulate(
            f"torch {torch.__version__} is a CUDA build, which torch_npu refuses; a CPU build is needed"
        )
    if torch.__version__.split(".")[:2] != TORCH_NPU.split(".")[:2]:
        raise CannotSimulate(f"torch is {torch.__version__}, torch_npu {TORCH_NPU} needs the same minor version")


def _hash() -> str:
    content = hashlib.sha256(TORCH_NPU.encode())
    for path in (*sorted(SOURCES.iterdir()), Path(__file__)):
        content.update(path.read_bytes())
    return content.hexdigest()[:12]


def _build_libraries(site: Path, lib: Path) -> None:
    """The sources, and for every other symbol the wheel must find to be loaded a function that returns 0.

    What the wheel looks up by name at run time and does not find it reports itself.
    """
    written = "".join(path.read_text() for path in SOURCES.glob("*.c"))
    stubs = sorted(name for name in _undefined(site) if not re.search(rf"\b{name}\b", written))
    (lib / "stubs.c").write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in stubs))
    (lib / "empty.c").write_text("void ascend_simulator_empty(void) {}\n")
    sources = [*map(str, sorted(SOURCES.glob("*.c"))), str(lib / "stubs.c")]
    for name in LIBRARIES:
        content = [str(lib / "empty.c")] if name in EMPTY_LIBRARIES else sources
        # The second one with functions only has to resolve: both carry them, the first loaded answers.
        command = ["gcc", "-O1", "-shared", "-fPIC", "-w", f"-Wl,-soname,{name}", "-o", str(lib / name), *content]
        subprocess.run([*command, "-lpthread"], check=True)


def _undefined(site: Path) -> set[str]:
    names: set[str] = set()
    for library in sorted((site / "torch_npu").rglob("*.so")):
        if "dynamo" in library.parts:  # the graph compiler; not loaded
            continue
        table = subprocess.run(
            ["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True
        )
        names |= set(CANN_SYMBOL.findall(table.stdout))
    return names


if __name__ == "__main__":
    try:
        for name, value in environment(build()).items():
            print(f"export {name}={value}")
    except CannotSimulate as reason:
        sys.exit(f"ascend simulator: {reason}")
