"""What may not change when a run is continued."""

from __future__ import annotations

from typing import Any

from mindspeed_llm.config.run import RunConfig, all_options


def is_allowed(config: RunConfig, name: str) -> bool:
    """Whether `--allow-change` names this option."""
    return name in {n.removeprefix("--").replace("-", "_") for n in config.checkpoint.allow_change or ()}


def continue_run(config: RunConfig, record: dict[str, Any]) -> list[str]:
    """Take over the recorded options that were not given, and report the given ones that differ.

    Args:
        record: of the checkpoint that is resumed.

    Returns:
        A line for each option that changed without `--allow-change`.
    """
    problems = []
    for name, before in record["continuity"].items():
        if name not in config.given:
            config.set(name, before)
        elif config.get(name) != before and name != "data_path" and not is_allowed(config, name):
            flag = all_options()[name].flags[0]
            problems.append(
                f"resume: {flag} was {before} and is now {config.get(name)}; "
                f"keep it, or --allow-change {flag[2:]} if it is meant"
            )
    return problems
