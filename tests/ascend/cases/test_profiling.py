"""torch_npu's profiler takes what --profile-... become; what it writes needs CANN's analysis."""

import pytest
from torch_npu import profiler as torch_npus

from mindspeed_llm import accelerator
from mindspeed_llm.config.parser import parse
from mindspeed_llm.config.profiling import ProfilingConfig
from mindspeed_llm.plan.profiling import profiling_problems


@pytest.mark.parametrize("profile_level", ["level_none", "level0", "level1", "level2"])
@pytest.mark.parametrize("profile_export_type", ["text", "db"])
def test_every_option_reaches_torch_npus_profiler(monkeypatch, tmp_path, profile_level, profile_export_type):
    made = {}
    real = torch_npus._ExperimentalConfig
    monkeypatch.setattr(torch_npus, "_ExperimentalConfig", lambda **given: made.update(given) or real(**given))
    monkeypatch.setattr(torch_npus, "profile", lambda **given: made.update(given) or "the profiler")
    options = ProfilingConfig(
        profile=True, profile_save_path=str(tmp_path), profile_with_stack=True, profile_with_cpu=True,
        profile_level=profile_level, profile_export_type=profile_export_type, profile_data_simplification=True,
    )  # fmt: skip
    assert accelerator.get("npu").profiler(options, "rank0") == "the profiler"
    levels = torch_npus.ProfilerLevel
    assert made["profiler_level"] == getattr(levels, profile_level.capitalize())
    assert made["experimental_config"].export_type == [profile_export_type] and made["data_simplification"] is True
    assert (made["with_stack"], made["profile_memory"], made["record_shapes"]) == (True, False, False)
    assert made["activities"] == [torch_npus.ProfilerActivity.NPU, torch_npus.ProfilerActivity.CPU]


def test_the_real_profiler_is_made_of_them(tmp_path):
    made = accelerator.get("npu").profiler(ProfilingConfig(profile=True, profile_save_path=str(tmp_path)), "rank0")
    assert isinstance(made, torch_npus.profile)
    made.stopped = True  # it was not started: nothing to write when it is collected


def test_options_of_ascend_are_legal_here():
    words = "--profile --profile-level level1 --profile-export-type db --profile-data-simplification --profile-with-cpu"
    assert profiling_problems(parse("pretrain", words.split()).config) == []
