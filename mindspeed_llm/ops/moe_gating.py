"""Which experts a token goes to and with which weights.

    scores s = logits, softmax(logits) or sigmoid(logits), each over all experts
    chosen   the k largest of s + bias, within the best groups of experts where there are groups
    weights  w_j = s_j of the chosen; then softmax over them, or divided by their sum, or as they are; times a factor

The bias takes part in the choice alone, and the choice has no gradient. Sources: Mixtral, Qwen-MoE (softmax),
DeepSeek-V2 (groups ranked by their best score), DeepSeek-V3 (sigmoid, bias, groups ranked by their two best).

Legend: t tokens, e experts, k experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mindspeed_llm.ops.registry import REFERENCE, implementation, register

# Keeps the quotient defined where all chosen scores are 0, as DeepSeek does.
SMALLEST_SUM = 1e-20


@dataclass(frozen=True)
class Gating:
    """How experts are chosen and weighted.

    Args:
        topk: experts per token.
        score_function: "softmax" or "sigmoid".
        pre_softmax: the softmax is over all experts, before the choice; otherwise over the chosen.
        normalized: chosen scores are divided by their sum (they need no such thing after a softmax over them).
        scaling_factor: multiplies the weights; None for 1.
        num_groups, chosen_groups: of experts, and how many a token may use; None for no groups.
        summed: best scores of a group whose sum ranks it.
    """

    topk: int
    score_function: str = "softmax"
    pre_softmax: bool = False
    normalized: bool = False
    scaling_factor: float | None = None
    num_groups: int | None = None
    chosen_groups: int | None = None
    summed: int = 1

    @property
    def softmax_later(self) -> bool:
        """Whether the weights are a softmax over the chosen logits."""
        return self.score_function == "softmax" and not self.pre_softmax


def moe_gating(logits: Tensor, gating: Gating, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The experts of each token and their weights.

    Args:
        logits: [t, e]; bias: [e] fp32, or None.

    Returns:
        weights [t, k] in fp32 (fp64 for such logits), expert numbers [t, k].
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return implementation("moe_gating")(logits, gating, bias)


@register("moe_gating", "torch")
def saved_by_choice(logits: Tensor, gating: Gating, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Saves scores, weights and choice, and no intermediate of the steps between."""
    return gating_by(_scores_and_choice, logits, gating, bias)


# (logits, gating, bias) -> scores of all experts [t, e], the chosen experts [t, k]
Choice = Callable[[Tensor, Gating, Tensor | None], tuple[Tensor, Tensor]]


def gating_by(choose: Choice, logits: Tensor, gating: Gating, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `moe_gating`, with scores and choice by `choose`, which is not differentiated."""
    return _Gating.apply(logits, gating, bias, choose)


class _Gating(torch.autograd.Function):
    """With w the weights before the factor c, z = sum of chosen s and g = c dw:

    normalized: ds = (g - sum(g w)) / z    softmax over the chosen: ds = w (g - sum(g w))    else ds = g
    then through the scores of all experts: softmax s (ds - sum(ds s)), sigmoid ds s (1 - s).
    """

    @staticmethod
    def forward(ctx, logits: Tensor, gating: Gating, bias: Tensor | None, choose: Choice) -> tuple[Tensor, Tensor]:
        scores, experts = choose(logits, gating, bias)
        picked = scores.gather(1, experts)
        total = None
        if gating.softmax_later:
            weights = torch.softmax(picked, dim=-1)
        elif gating.normalized:
            total = picked.sum(dim=-1, keepdim=True) + SMALLEST_SUM
            weights = picked / total
        else:
            weights = picked
        ctx.gating = gating
        ctx.save_for_backward(None if gating.softmax_later else scores, weights, total, experts)
        ctx.num_experts = logits.shape[1]
        ctx.mark_non_differentiable(experts)
        return weights if gating.scaling_factor is None else weights * gating.scaling_factor, experts

    @staticmethod
    def backward(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        gating, (scores, weights, total, experts) = ctx.gating, ctx.saved_tensors
        if gating.scaling_factor is not None:
            grad = grad * gating.scaling_factor
        if gating.softmax_later:
            grad = _SCORES_BACKWARD["softmax"](grad, weights)
        elif total is not None:
            grad = (grad - (grad * weights).sum(-1, keepdim=True)) / total
        grad_scores = grad.new_zeros(grad.shape[0], ctx.num_experts).scatter_(1, experts, grad)
        if scores is None:
            return grad_scores, None, None, None
        backward = _SCORES_BACKWARD[gating.score_function]
        return backward(grad_scores, scores), None, None, None


# torch's own derivatives, a kernel each.
_SCORES_BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "softmax": lambda grad, scores: torch.ops.aten._softmax_backward_data(grad, scores, -1, scores.dtype),
    "sigmoid": torch.ops.aten.sigmoid_backward,
}


def _scores(logits: Tensor, gating: Gating) -> Tensor:
    if gating.softmax_later:
        return logits
    return torch.softmax(logits, dim=-1) if gating.score_function == "softmax" else torch.sigmoid(logits)


def _scores_and_choice(logits: Tensor, gating: Gating, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    scores = _scores(logits, gating)
    return scores, best_experts(scores if bias is None else scores + bias, gating)


def best_experts(scores: Tensor, gating: Gating) -> Tensor:
    """[t, e] -> the k best experts [t, k], of the best groups where there are groups."""
    if gating.num_groups is None:
        return scores.topk(gating.topk, dim=-1).indices
    grouped = scores.unflatten(1, (gating.num_groups, -1))
    best = grouped.topk(gating.summed, dim=-1).values.sum(dim=-1).topk(gating.chosen_groups, dim=-1).indices
    outside = torch.ones(grouped.shape[:2], dtype=torch.bool, device=scores.device).scatter(1, best, False)
    return grouped.masked_fill(outside.unsqueeze(-1), float("-inf")).flatten(1).topk(gating.topk, dim=-1).indices


@register("moe_gating", REFERENCE, priority=-1)
def reference(logits: Tensor, gating: Gating, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The formula, differentiated by autograd."""
    scores = _scores(logits, gating)
    experts = best_experts((scores if bias is None else scores + bias).detach(), gating)
    weights = scores.gather(1, experts)
    if gating.softmax_later:
        weights = torch.softmax(weights, dim=-1)
    elif gating.normalized:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + SMALLEST_SUM)
    return weights if gating.scaling_factor is None else weights * gating.scaling_factor, experts
