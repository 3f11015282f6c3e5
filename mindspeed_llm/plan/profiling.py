"""Options of the profiler that cannot be met."""

from __future__ import annotations

import dataclasses

from mindspeed_llm import accelerator
from mindspeed_llm.config.profiling import ProfilingConfig
from mindspeed_llm.config.run import RunConfig, all_options

# What only torch_npu's profiler knows.
OF_ASCEND = ("profile_level", "profile_export_type", "profile_data_simplification")


def profiling_problems(config: RunConfig) -> list[str]:
    """A line for each option that is refused."""
    p, defaults = config.profiling, ProfilingConfig()
    changed = [f.name for f in dataclasses.fields(p) if getattr(p, f.name) != getattr(defaults, f.name)]
    if not p.profile:
        return [f"{_flags(changed)}: no meaning without --profile"] if changed else []
    problems, device = [], _device(config)
    if 0 <= p.profile_step_end <= p.profile_step_start:
        problems.append(
            f"--profile-step-end {p.profile_step_end} is not after --profile-step-start {p.profile_step_start}: "
            f"nothing is traced; legal: from {p.profile_step_start + 1}, or -1"
        )
    foreign = [name for name in OF_ASCEND if name in changed]
    if foreign and device != "npu":
        problems.append(f"{_flags(foreign)}: needs an Ascend NPU, and the device is {device}")
    if p.profile_with_cpu and device == "cpu":
        problems.append("--profile-with-cpu has no meaning on a CPU: all that is traced there is the host's")
    return problems


def _device(config: RunConfig) -> str:
    return accelerator.current().name if config.runtime.device == "auto" else config.runtime.device


def _flags(names: list[str]) -> str:
    return ", ".join(all_options()[name].flags[0] for name in names)
