"""Options of what a run records and measures that cannot be met."""

from __future__ import annotations

import importlib.util

from mindspeed_llm.config.run import RunConfig, all_options
from mindspeed_llm.plan.profiling import profiling_problems

# Option that asks for a service -> the package that speaks to it.
PACKAGES = {"wandb_project": "wandb", "swanlab_project": "swanlab"}
# Option -> the option without which it has no meaning.
COMPANIONS = {
    "wandb_exp_name": "wandb_project",
    "wandb_entity": "wandb_project",
    "wandb_save_dir": "wandb_project",
    "swanlab_exp_name": "swanlab_project",
    "swanlab_workspace": "swanlab_project",
    "swanlab_save_dir": "swanlab_project",
    "straggler_window": "straggler_threshold",
}


def monitoring_problems(config: RunConfig) -> list[str]:
    """A line for each option that is refused."""
    problems = [*_missing_packages(config), *_missing_companions(config), *profiling_problems(config)]
    log, p = config.logging, config.parallel
    if log.log_local_norms and p.overlap_grad_reduce:
        problems.append(
            "--log-local-norms does not go with --overlap-grad-reduce: a rank's own gradient is reduced before it is "
            "complete; try: without --overlap-grad-reduce"
        )
    if log.log_max_attention_logit and p.context_parallel_size > 1:
        problems.append(
            f"--log-max-attention-logit does not go with --context-parallel-size {p.context_parallel_size}: no rank "
            "sees all keys of a sequence; legal: --context-parallel-size 1"
        )
    return problems


def _missing_packages(config: RunConfig) -> list[str]:
    return [
        f"{_flag(option)}: {config.get(option)} is wrong, because the package {package} is not installed; "
        f"try: pip install {package}, or --tensorboard-dir"
        for option, package in PACKAGES.items()
        if config.get(option) is not None and importlib.util.find_spec(package) is None
    ]


def _missing_companions(config: RunConfig) -> list[str]:
    return [
        f"{_flag(option)}: no meaning without {_flag(needed)}"
        for option, needed in COMPANIONS.items()
        if option in config.given and config.get(needed) is None
    ]


def _flag(option: str) -> str:
    return all_options()[option].flags[0]
