"""Transformer Engine's cross entropy over a vocabulary cut among tensor-parallel ranks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mindspeed_llm.models.stand_ins.transformer_engine.refusal import refuse

IGNORED = -100  # TE's ignore_idx


def parallel_cross_entropy(
    logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, reduce_loss: bool = False, tp_group: Any = None
) -> Tensor:
    """Loss of logits [a, b, v/tp] at labels [a, b], 0 where the label is -100; a number where reduce_loss.

    Raises:
        UserError: labels are to be smoothed.
    """
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    if label_smoothing:
        raise refuse(f"label_smoothing={label_smoothing}", "0")
    ignored = labels == IGNORED
    loss = fused_vocab_parallel_cross_entropy(logits, labels.masked_fill(ignored, 0), tp_group)
    loss = loss.masked_fill(ignored, 0.0)
    return loss.sum() / (~ignored).sum() if reduce_loss else loss
