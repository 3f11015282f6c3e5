"""`python -m mindspeed_llm doctor`: versions, devices, chosen implementations, what is missing and why."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform

# package -> what it is for here; the first group is required.
REQUIRED = ("torch", "megatron-core", "transformers", "tokenizers", "safetensors", "sentencepiece", "datasets", "numpy")
OPTIONAL = {
    "torch_npu": "Ascend NPUs",
    "transformer-engine": "used by megatron-core where it is really there; never required",
    "apex": "used by megatron-core where it is really NVIDIA's; never required",
    "liger-kernel": "Triton kernels on CUDA",
    "flash-attn": "attention kernels on CUDA",
    "peft": "checking exported adapters",
    "modelscope": "--hub modelscope",
}
ENVIRONMENT = (
    "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES", "MINDSPEED_LLM_DEVICE",
    "MINDSPEED_LLM_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE", "TORCH_DEVICE_BACKEND_AUTOLOAD",
)  # fmt: skip
# What NVIDIA's apex has and the package index's unrelated project of that name does not.
APEX_MARK = "apex.optimizers"


def doctor() -> int:
    """Print the report; 1 when something required is missing."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 110, highlight=False)
    missing = []
    table = Table(title="versions", title_justify="left", show_header=False)
    table.add_row("python", f"{platform.python_version()} on {platform.machine()}")
    for name in REQUIRED:
        version = version_of(name)
        table.add_row(name, version or "MISSING: pip install " + name)
        missing += [] if version else [name]
    for name, purpose in OPTIONAL.items():
        table.add_row(name, describe_optional(name) or f"not here ({purpose})")
    console.print(table)
    if missing:
        console.print(f"missing: {', '.join(missing)}")
        return 1
    console.print(_devices())
    console.print(_operators())
    patches = Table(title="patches in force", title_justify="left", show_header=False)
    for name, target in _patches():
        patches.add_row(name, target)
    console.print(patches)
    settings = Table(title="environment", title_justify="left", show_header=False)
    for name in ENVIRONMENT:
        settings.add_row(name, os.environ.get(name, "not set"))
    console.print(settings)
    return 0


def version_of(package: str) -> str | None:
    """Installed version of a distribution, None when there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe_optional(package: str) -> str | None:
    """Version and whether it is what its name promises; None when absent."""
    version = version_of(package)
    if version is None:
        return None
    if package == "apex":
        try:
            real = importlib.util.find_spec(APEX_MARK) is not None
        except (ImportError, ValueError):
            real = False
        return version if real else f"{version}: an unrelated project of that name, not used"
    return version


def _devices():
    import torch
    from rich.table import Table

    from mindspeed_llm import accelerator
    from mindspeed_llm.accelerator import host_allocator, host_compiler

    current = accelerator.current()
    table = Table(title="devices", title_justify="left", show_header=False)
    for name in accelerator.NAMES:
        device = accelerator.get(name)
        chosen = " (used)" if device is current else ""
        table.add_row(name, f"{device.device_count()} available{chosen}" if device.is_available() else "none here")
    table.add_row("model", current.model())
    table.add_row("collectives", current.distributed_backend)
    table.add_row("memory", f"{current.memory_total() / 2**30:.1f} GiB")
    peak = current.peak_flops(torch.bfloat16)
    table.add_row("bf16 peak", f"{peak / 1e12:.0f} TFLOP/s" if peak else "unknown: no MFU in the log")
    table.add_row("CPU memory", host_allocator.describe())
    table.add_row("C++ compiler", host_compiler.describe())
    table.add_row("CPU threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores")
    return table


def _operators():
    from rich.table import Table

    from mindspeed_llm import ops
    from mindspeed_llm.ops import registry

    ops.load_all()

    table = Table(title="operators", title_justify="left", show_header=False)
    for operator, implementation in registry.chosen().items():
        table.add_row(operator, implementation)
    return table


def _patches() -> list[tuple[str, str]]:
    from mindspeed_llm import accelerator, patches, patching
    from mindspeed_llm.accelerator import torch_facade

    torch_facade.install(accelerator.current())  # before megatron is loaded, which applying does
    patches.apply()
    return [(patch.name, patch.target) for patch in patching.applied()]
