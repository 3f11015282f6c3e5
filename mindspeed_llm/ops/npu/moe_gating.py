"""Choice of experts by `npu_moe_gating_top_k`, or `npu_moe_gating_top_k_softmax_v2` where the softmax comes after it.

The kernels are written for inference: torch_npu differentiates one form of one of them. The derivative is ours, and the
weights are formed from the scores here, so that what is normalised and scaled is the model's rule and not the kernel's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mindspeed_llm.ops.moe_gating import Gating, gating_by, saved_by_choice
from mindspeed_llm.ops.npu.kernels import DEVICES, FLOATS, REQUIRES
from mindspeed_llm.ops.registry import register

# Limits of the kernels.
MOST_EXPERTS = 2048
MOST_CHOSEN = 1024
SMALLEST_GROUP = 3
GROUP_STEP = 32  # groups of experts are laid out in multiples of this many
# norm_type, and group_select_mode by the number of best scores whose sum ranks a group
NORMS = {"softmax": 0, "sigmoid": 1}
GROUP_SCORES = {1: 0, 2: 1}


@register("moe_gating", "npu_moe_gating_top_k", devices=DEVICES, requires=REQUIRES, priority=1)
def npu_gating(logits: Tensor, gating: Gating, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `ops.moe_gating.moe_gating`."""
    if logits.dtype not in FLOATS or logits.shape[0] == 0:
        return saved_by_choice(logits, gating, bias)
    if gating.softmax_later:
        plain = bias is None and gating.num_groups is None and gating.topk <= MOST_CHOSEN
        choose = _largest_logits if plain else None
    else:
        choose = _best_scores if _fits(logits.shape[1], gating) else None
    return saved_by_choice(logits, gating, bias) if choose is None else gating_by(choose, logits, gating, bias)


def _fits(num_experts: int, gating: Gating) -> bool:
    groups = gating.num_groups or 1
    size = num_experts // groups
    padded = -(-size // GROUP_STEP) * GROUP_STEP * groups
    ranked = groups == 1 or gating.summed in GROUP_SCORES
    return ranked and size >= SMALLEST_GROUP and max(num_experts, padded) <= MOST_EXPERTS


def _best_scores(logits: Tensor, gating: Gating, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scores of all experts [t, e] and the chosen experts [t, k]."""
    groups = gating.num_groups or 1
    _, experts, scores = torch.ops.npu.npu_moe_gating_top_k(
        logits,
        gating.topk,
        bias=None if bias is None else bias.to(logits.dtype),
        k_group=gating.chosen_groups or 1,
        group_count=groups,
        group_select_mode=0 if groups == 1 else GROUP_SCORES[gating.summed],
        norm_type=NORMS[gating.score_function],
        out_flag=True,
    )
    return scores, experts.long()


def _largest_logits(logits: Tensor, gating: Gating, bias: None) -> tuple[Tensor, Tensor]:
    """The logits, which are the scores here, and the chosen experts [t, k]."""
    _, experts, _ = torch.ops.npu.npu_moe_gating_top_k_softmax_v2(logits, k=gating.topk, renorm=1)
    return logits, experts.long()
