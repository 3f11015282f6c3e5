"""Transformer Engine's routing of tokens to experts: in one kernel there, the same formulas step by step here."""

from __future__ import annotations

import torch
from torch import Tensor

# Added to a sum that divides, as megatron-core's topk_routing_with_score_function does.
SMALL = 1e-20


def _best(scores: Tensor, topk: int, num_groups: int | None, group_topk: int | None) -> Tensor:
    """Experts [t, topk] of the highest scores, those in the group_topk best groups if groups are given.

    A group's score is the sum of its topk / group_topk best (DeepSeek-V3, arXiv:2412.19437, section 2.1.2).
    """
    if group_topk:
        grouped = scores.unflatten(1, (num_groups, -1))
        of_group = grouped.topk(topk // group_topk, dim=-1).values.sum(-1)
        chosen = torch.zeros_like(of_group, dtype=torch.bool).scatter(1, of_group.topk(group_topk, dim=1).indices, True)
        scores = grouped.masked_fill(~chosen.unsqueeze(-1), float("-inf")).flatten(1)
    return scores.topk(topk, dim=1).indices


def _map(logits: Tensor, chosen: Tensor) -> Tensor:
    return torch.zeros_like(logits, dtype=torch.bool).scatter(1, chosen, True)


def fused_topk_with_score_function(
    logits: Tensor,
    topk: int,
    use_pre_softmax: bool = False,
    num_groups: int | None = None,
    group_topk: int | None = None,
    scaling_factor: float | None = None,
    score_function: str = "softmax",
    expert_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits [t, experts] -> weights [t, experts], zero where not chosen, and the map of what is chosen.

    Args:
        use_pre_softmax: softmax over all experts, then choose; otherwise over the chosen.
        expert_bias: [experts], added to sigmoid scores for the choice alone.

    Raises:
        ValueError: an unknown score function, or a bias on softmax scores.
    """
    if score_function == "softmax" and expert_bias is None:
        scores = torch.softmax(logits, dim=-1, dtype=torch.float32) if use_pre_softmax else logits.float()
        chosen = _best(scores, topk, num_groups, group_topk)
        weights = scores.gather(1, chosen)
        weights = weights if use_pre_softmax else torch.softmax(weights, dim=-1)
    elif score_function == "sigmoid":
        scores = torch.sigmoid(logits.float())
        chosen = _best(scores if expert_bias is None else scores + expert_bias, topk, num_groups, group_topk)
        weights = scores.gather(1, chosen)
        weights = weights / (weights.sum(dim=-1, keepdim=True) + SMALL) if topk > 1 else weights
    else:
        raise ValueError(f"score_function {score_function!r} is wrong; legal: softmax without expert_bias, sigmoid")
    weights = weights * (scaling_factor or 1.0)
    return torch.zeros_like(logits).scatter(1, chosen, weights.to(logits.dtype)), _map(logits, chosen)


def fused_compute_score_for_moe_aux_loss(logits: Tensor, topk: int, score_function: str) -> tuple[Tensor, Tensor]:
    """Logits [t, experts] -> the map of the topk best, and scores in fp32 that sum to 1.

    Raises:
        ValueError: an unknown score function.
    """
    if score_function == "softmax":
        scores = torch.softmax(logits, dim=-1, dtype=torch.float32)
    elif score_function == "sigmoid":
        scores = torch.sigmoid(logits.float())
        scores = scores / (scores.sum(dim=-1, keepdim=True) + SMALL)
    else:
        raise ValueError(f"score_function {score_function!r} is wrong; legal: softmax, sigmoid")
    return _map(logits, scores.topk(topk, dim=1).indices), scores


def fused_moe_aux_loss(
    probs: Tensor, tokens_per_expert: Tensor, total_num_tokens: int, num_experts: int, topk: int, coeff: float
) -> Tensor:
    """The loss that balances experts: coeff E sum_i f_i P_i (Switch Transformers, arXiv:2101.03961, section 2.2).

    Args:
        probs: scores [t, experts] of this rank's tokens.
        tokens_per_expert: [experts], of total_num_tokens tokens.
    """
    scale = num_experts * coeff / (topk * total_num_tokens * total_num_tokens)
    return (probs.sum(dim=0) * tokens_per_expert).sum() * scale
