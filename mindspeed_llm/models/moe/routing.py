"""Which experts a token goes to and with which weights: pure functions of the router's logits.

Legend: t tokens, e experts, k experts per token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.ops.moe_gating import Gating, moe_gating


def choose_experts(logits: Tensor, shape: ModelShape, score_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The experts of each token and their weights, see ops.moe_gating.

    Args:
        logits: [t, e].
        shape: its moe_router_* fields and norm_topk_prob.
        score_bias: [e] fp32, or None.

    Returns:
        weights [t, k] in fp32 (fp64 for such logits), expert numbers [t, k].
    """
    return moe_gating(logits, gating_of(shape), score_bias)


def gating_of(shape: ModelShape) -> Gating:
    """How a model of this shape chooses experts."""
    topk, groups, chosen = shape.moe_router_topk, shape.moe_router_num_groups, shape.moe_router_group_topk
    return Gating(
        topk=topk,
        score_function=shape.moe_router_score_function,
        pre_softmax=shape.moe_router_pre_softmax,
        normalized=shape.norm_topk_prob,
        scaling_factor=shape.moe_router_topk_scaling_factor,
        num_groups=groups,
        chosen_groups=chosen,
        summed=1 if groups is None else shape.moe_router_group_score_topk or max(topk // chosen, 1),
    )


def routing_tables(weights: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """[t, k] weights and expert numbers -> weights [t, e], zero elsewhere, and where they are, [t, e] bool."""
    size = (weights.shape[0], num_experts)
    probs = torch.zeros(size, dtype=weights.dtype, device=weights.device).scatter(1, experts, weights)
    return probs, torch.zeros(size, dtype=torch.bool, device=weights.device).scatter(1, experts, True)


def expert_capacity(num_tokens: int, shape: ModelShape, factor: float) -> int:
    """Tokens that an expert takes from one rank's micro-batch: `factor` times an even share, rounded up."""
    return math.ceil(num_tokens * shape.moe_router_topk / shape.num_moe_experts * factor)


def drop_tokens(probs: Tensor, routing_map: Tensor, capacity: int, policy: str, pad: bool) -> tuple[Tensor, Tensor]:
    """Keep at most `capacity` tokens of each expert.

    Args:
        probs, routing_map: [t, e].
        policy: "probs" keeps the tokens of the largest weight, "position" the first ones.
        pad: fill every expert up to its capacity (or all tokens) with tokens of weight zero.

    Returns:
        Both tables without what was dropped.
    """
    capacity = min(capacity, probs.shape[0])
    # Chosen tokens come before the others, which a stable sort leaves in their order.
    if policy == "probs":
        rank = torch.where(routing_map, probs.detach(), -1.0)
    else:
        rank = routing_map.to(probs.dtype)
    order = rank.argsort(dim=0, descending=True, stable=True)[:capacity]
    kept = torch.zeros_like(routing_map).scatter(0, order, True)
    if not pad:
        kept &= routing_map
    return probs * (kept & routing_map), kept
