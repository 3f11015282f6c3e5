"""Options of the profiler: which iterations of which ranks are traced, and what a trace holds."""

from __future__ import annotations

from mindspeed_llm.config.schema import at_least, option, section

EVERY_RANK = -1


@section
class ProfilingConfig:
    """A trace of some iterations, written when they are over."""

    profile: bool = option(
        help="trace some iterations; traces and pages that sum them up lie in --profile-save-path", level="advanced"
    )
    profile_step_start: int = option(10, help="iterations before the trace begins", level="advanced", check=at_least(0))
    profile_step_end: int = option(
        12, help="iterations before the trace ends; -1 for the end of training", level="advanced", check=at_least(-1)
    )
    profile_ranks: list[int] = option(
        [0], help="ranks that trace; -1 for all", level="advanced", check=at_least(EVERY_RANK)
    )
    profile_save_path: str = option("./profile_dir", help="folder of the traces", level="advanced", writes="directory")
    profile_with_cpu: bool = option(help="what the host does, too", level="advanced")
    profile_with_stack: bool = option(help="the Python calls behind each operator, too", level="advanced")
    profile_with_memory: bool = option(help="what operators allocate and free, too", level="advanced")
    profile_record_shapes: bool = option(help="the shapes that operators are given, too", level="advanced")
    profile_level: str = option(
        "level0",
        help="Ascend: level0 has kernels, level1 also CANN's calls and communication, level2 also the runtime",
        choices=("level_none", "level0", "level1", "level2"),
        level="advanced",
    )
    profile_export_type: str = option(
        "text", help="Ascend: files of text, or a database", choices=("text", "db"), level="expert"
    )
    profile_data_simplification: bool = option(
        help="Ascend: keep the analysed trace alone and delete what it was made of", level="expert"
    )
