"""Options of a training run that do not fit its batch, its processes or what it trains."""

from __future__ import annotations

from mindspeed_llm.config.profiling import EVERY_RANK
from mindspeed_llm.config.run import RunConfig

FULL_TUNING_LR = 1e-5
DEFAULT_LR = 1e-4


def peak_learning_rate(config: RunConfig, adapted: bool) -> float:
    """`--lr` or its default: fine-tuning without adapters starts from weights that are good already."""
    tunes_all = config.door == "posttrain" and not adapted
    return config.optimizer.lr or (FULL_TUNING_LR if tunes_all else DEFAULT_LR)


def run_problems(config: RunConfig, *, global_batch_size: int, world_size: int, adapted: bool) -> list[str]:
    """A line for each option that is refused.

    Args:
        adapted: whether adapters are trained.
    """
    o, t, p = config.optimizer, config.training, config.profiling
    problems, peak = [], peak_learning_rate(config, adapted)
    if o.min_lr > peak and not t.eval_only:
        problems.append(f"--min-lr: {o.min_lr} is above the default --lr {peak}; give --lr")
    if t.train_samples is not None and t.train_samples < global_batch_size:
        problems.append(
            f"--train-samples: {t.train_samples} is less than one global batch of {global_batch_size}; "
            f"legal: {global_batch_size} or more"
        )
    absent = [str(rank) for rank in p.profile_ranks if rank >= world_size]
    if p.profile and absent:
        problems.append(
            f"--profile-ranks: {', '.join(absent)} is wrong, because the run has {world_size} ranks; "
            f"legal: 0 to {world_size - 1}, or {EVERY_RANK} for all"
        )
    packs = [flag for flag, on in (("--pack", config.data.pack), ("--neat-pack", config.data.neat_pack)) if on]
    if config.door == "posttrain" and packs and not t.padding_free:
        problems.append(
            f"--no-padding-free does not go with {packs[0]}: rows that are joined alone keep the documents of one row "
            "apart; leave out one of the two"
        )
    return problems
