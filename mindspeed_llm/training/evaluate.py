"""Loss on the validation part, by the same rule as the training loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mindspeed_llm.training.data import TrainingData
from mindspeed_llm.training.step import run_batch


@dataclass(frozen=True)
class Evaluation:
    """Mean loss per trained token over `trained_tokens` of `batches` global batches."""

    loss: float
    trained_tokens: int
    batches: int


def evaluate(chunks: list[torch.nn.Module], data: TrainingData, plan: Any, iterations: int) -> Evaluation:
    """Evaluate on the first `iterations` global batches of the validation part; leaves the model in training mode."""
    from megatron.core import parallel_state

    for chunk in chunks:
        chunk.eval()
    total, trained, batches = 0.0, 0, 0
    try:
        with torch.no_grad():
            for micro in data.evaluation_batches(iterations, parallel_state.get_data_parallel_rank()):
                result = run_batch(chunks, micro, plan, forward_only=True)
                if result.trained_tokens:
                    total += result.loss * result.trained_tokens
                trained += result.trained_tokens
                batches += 1
    finally:
        for chunk in chunks:
            chunk.train()
    return Evaluation(total / trained if trained else float("nan"), trained, batches)
