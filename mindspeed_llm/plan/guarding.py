"""Options of guarding that have no meaning or cannot be met."""

from __future__ import annotations

from mindspeed_llm import accelerator
from mindspeed_llm.config.guards import policy_of
from mindspeed_llm.config.run import RunConfig, all_options


def guarding_problems(config: RunConfig) -> list[str]:
    """A line for each option that is refused."""
    g = config.guards
    problems = []
    if g.grad_norm_spike_threshold is None and g.loss_spike_threshold is None:
        for name in ("spike_window", "spike_count", "spike_action"):
            if name in config.given:
                problems.append(
                    f"{_flag(name)}: no meaning without a threshold; try: --grad-norm-spike-threshold or "
                    "--loss-spike-threshold"
                )
    if "spike_count" in config.given and g.spike_action != "rewind":
        problems.append(f"--spike-count: no meaning with --spike-action {g.spike_action}; legal: --spike-action rewind")
    for flag in _rewinding(config):
        if config.checkpoint.save is None:
            problems.append(f"{flag}: there is nothing to go back to without --save; try: --save DIR")
        elif config.checkpoint.no_save_optim:
            problems.append(f"{flag} does not go with --no-save-optim: a run cannot go back without optimizer state")
    if g.replay_batch_interval is not None and not _is_deterministic():
        problems.append(
            f"--replay-batch-interval: {g.replay_batch_interval} is wrong, because the kernels of this device may give "
            "other bits each time; legal: a CPU, or torch.use_deterministic_algorithms(True) before the start"
        )
    return problems


def _rewinding(config: RunConfig) -> list[str]:
    """The options that ask to go back."""
    g = config.guards
    asked = {"--on-nonfinite rewind": (policy_of(g.on_nonfinite) or ("", 0))[0] == "rewind"}
    asked["--spike-action rewind"] = g.spike_action == "rewind"
    return [flag for flag, on in asked.items() if on]


def _is_deterministic() -> bool:
    import torch

    return accelerator.current().device_type == "cpu" or torch.are_deterministic_algorithms_enabled()


def _flag(option: str) -> str:
    return all_options()[option].flags[0]
