"""Options of guarding: what happens when numbers go wrong, and how often they are looked at."""

from __future__ import annotations

import re

from mindspeed_llm.config.schema import above, at_least, option, section

LEGAL_POLICIES = (
    "stop, skip:N (leave out at most N batches in the run), rewind or rewind:N (at most N times in the run)"
)
DEFAULT_REWINDS = 3


def policy_of(text: str) -> tuple[str, int] | None:
    """("stop", 0), ("skip", N) or ("rewind", N) from what `--on-nonfinite` says; None when it says nothing legal."""
    if text == "stop":
        return "stop", 0
    if text == "rewind":
        return "rewind", DEFAULT_REWINDS
    found = re.fullmatch(r"(skip|rewind):([1-9]\d*)", text)
    return (found[1], int(found[2])) if found else None


def _check_policy(text: str) -> str | None:
    return None if policy_of(text) else f"legal: {LEGAL_POLICIES}"


@section
class GuardConfig:
    """What watches over losses, gradients and weights, and what is done when they go wrong."""

    on_nonfinite: str = option(
        "stop",
        help="when a loss or gradient is not finite (no step is taken): stop, skip:N to leave out at most N batches in "
        "the run, rewind to the newest healthy checkpoint and go on past the batch",
        check=_check_policy,
        metavar="stop|skip:N|rewind[:N]",
    )
    grad_norm_spike_threshold: float | None = option(
        help="a gradient norm this many robust standard deviations above the running median is a spike", check=above(0)
    )
    loss_spike_threshold: float | None = option(
        help="a loss this many robust standard deviations above the running median is a spike", check=above(0)
    )
    spike_window: int = option(
        64,
        help="iterations that the running median and deviation are of; nothing is judged before half of them",
        level="advanced",
        check=at_least(4),
    )
    spike_count: int = option(
        1, help="spikes in a row before --spike-action rewind acts", level="advanced", check=at_least(1)
    )
    spike_action: str = option(
        "warn",
        help="on a spike: warn, skip (no step on that batch), rewind to the newest healthy checkpoint and leave out "
        "the batches of the spikes",
        choices=("warn", "skip", "rewind"),
    )
    check_weight_hash_across_dp_replicas_interval: int | None = option(
        help="every N iterations and before saves: compare the bits of all copies of weights and optimizer state",
        level="advanced",
        check=at_least(1),
    )
    replay_batch_interval: int | None = option(
        help="every N iterations: compute the batch twice and compare loss and gradients bitwise",
        level="advanced",
        check=at_least(1),
    )
    embedding_local_norm_threshold: float | None = option(
        help="gradient norm of the word embeddings above which a checkpoint is marked unhealthy",
        level="advanced",
        check=above(0),
    )
