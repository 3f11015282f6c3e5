"""Transformer Engine's cross entropy over a vocabulary cut among tensor-parallel ranks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mindspeed_llm.models.stand_ins.transformer_engine.refusal import refuse
from mindspeed_llm.ops.cross_entropy import IGNORE_INDEX, vocab_parallel_cross_entropy


def parallel_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    label_smoothing: float = 0.0,
    reduce_loss: bool = False,
    tp_group: Any = None,
    ignore_idx: int = -100,
    is_cg_capturable: bool = False,
) -> Tensor:
    """Loss of logits [a, b, v/tp] at labels [a, b], 0 where the label is ignore_idx; a number where reduce_loss.

    Raises:
        UserError: labels are to be smoothed, or the kernel is to be recorded in a CUDA graph.
    """
    if label_smoothing:
        raise refuse(f"label_smoothing={label_smoothing}", "0")
    if is_cg_capturable:
        raise refuse(f"is_cg_capturable={is_cg_capturable}", "False (leave CUDA graphs off)")
    ignored = labels == ignore_idx
    loss = vocab_parallel_cross_entropy(logits, labels.masked_fill(ignored, IGNORE_INDEX), tp_group)
    return loss.sum() / (~ignored).sum() if reduce_loss else loss
