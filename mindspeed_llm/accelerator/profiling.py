"""Profilers of the devices, as objects with `start` and `stop`; stopping writes the trace.

A trace of torch's profiler is FOLDER/WORKER.TIME.pt.trace.json, for Perfetto or TensorBoard; one of torch_npu's is a
folder for MindStudio Insight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.profiler import ProfilerActivity

from mindspeed_llm.config.profiling import ProfilingConfig


def torch_profiler(options: ProfilingConfig, worker: str, device: str) -> torch.profiler.profile:
    """torch's profiler of a CPU, or of CUDA and, if asked for, its host.

    Args:
        worker: name in the traces' file names.
        device: "cpu" or "cuda".
    """
    activities = [ProfilerActivity.CUDA] if device == "cuda" else []
    if device == "cpu" or options.profile_with_cpu:
        activities.append(ProfilerActivity.CPU)
    write = torch.profiler.tensorboard_trace_handler(options.profile_save_path, worker)
    return torch.profiler.profile(activities=activities, on_trace_ready=write, **_contents(options))


def npu_profiler(options: ProfilingConfig, worker: str) -> Any:
    """torch_npu's profiler of an NPU and, if asked for, its host."""
    from torch_npu import profiler

    levels = {
        "level_none": profiler.ProfilerLevel.Level_none,
        "level0": profiler.ProfilerLevel.Level0,
        "level1": profiler.ProfilerLevel.Level1,
        "level2": profiler.ProfilerLevel.Level2,
    }
    exports = {"text": profiler.ExportType.Text, "db": profiler.ExportType.Db}
    activities = [profiler.ProfilerActivity.NPU]
    if options.profile_with_cpu:
        activities.append(profiler.ProfilerActivity.CPU)
    return profiler.profile(
        activities=activities,
        on_trace_ready=profiler.tensorboard_trace_handler(options.profile_save_path, worker),
        experimental_config=profiler._ExperimentalConfig(
            profiler_level=levels[options.profile_level],
            export_type=exports[options.profile_export_type],
            data_simplification=options.profile_data_simplification,
        ),
        **_contents(options),
    )


def _contents(options: ProfilingConfig) -> dict[str, bool]:
    return {
        "record_shapes": options.profile_record_shapes,
        "profile_memory": options.profile_with_memory,
        "with_stack": options.profile_with_stack,
    }
