"""Supervised fine-tuning: training on rows whose labels cover the answers alone."""

from __future__ import annotations

from mindspeed_llm.plan.plan import Plan
from mindspeed_llm.training.run import RunResult, run_training


def run_sft(plan: Plan, prefix: str, pad_token_id: int) -> RunResult:
    """Fine-tune as planned.

    Everything particular to SFT is data: rows with labels of their own, joined without padding, and a loss that is the
    mean over the trained tokens of the global batch, which is what `run_training` optimises anyway.
    """
    return run_training(plan, prefix, pad_token_id)
