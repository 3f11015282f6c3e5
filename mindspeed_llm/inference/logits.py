"""Scores -> scores: repetition penalty and the filters of sampling, as transformers defines them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mindspeed_llm.inference.settings import GenerationSettings


def penalize_repetition(scores: Tensor, seen: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Divide positive and multiply negative scores of tokens seen before.

    Args:
        scores: [b, v].
        seen: tokens of each row's prompt and answer.

    Source: arXiv 1909.05858, as in transformers' RepetitionPenaltyLogitsProcessor.
    """
    if penalty == 1.0:
        return scores
    scores = scores.clone()
    for row, tokens in zip(scores, seen):
        index = torch.tensor(list(set(tokens)), device=scores.device)
        old = row[index]
        row[index] = torch.where(old < 0, old * penalty, old / penalty)
    return scores


def filter_scores(scores: Tensor, settings: GenerationSettings, keep: int = 1) -> Tensor:
    """Temperature, then top-k, then top-p; what is filtered out becomes -inf.

    Args:
        scores: [b, v], logits or log-probabilities.
        keep: tokens that stay at least.
    """
    scores = scores / settings.temperature
    if settings.top_k:
        scores = top_k(scores, max(settings.top_k, keep))
    return scores if settings.top_p == 1.0 else top_p(scores, settings.top_p, keep)


def top_k(scores: Tensor, k: int) -> Tensor:
    """The k highest of each row (all that are as high as the k-th); the others -inf."""
    smallest = scores.topk(min(k, scores.shape[-1])).values[..., -1:]
    return scores.masked_fill(scores < smallest, float("-inf"))


def top_p(scores: Tensor, p: float, keep: int = 1) -> Tensor:
    """The likeliest tokens that together hold probability p, at least `keep`; the others -inf. arXiv 1904.09751."""
    ascending, order = scores.sort(descending=False)
    removed = ascending.softmax(-1).cumsum(-1) <= 1 - p
    removed[..., -keep:] = False
    return scores.masked_fill(removed.scatter(-1, order, removed), float("-inf"))
