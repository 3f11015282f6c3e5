"""Softmax of attention scores: softmax(scale x) over the keys a query sees, in fp32, rounded to the scores' dtype once.

    p_j = exp(scale x_j - m) / sum_k exp(scale x_k - m) over visible k, m their maximum; 0 where hidden

A query that sees nothing gets zeros, as Megatron's masked kernel does. Replaces the scaled_softmax,
scaled_masked_softmax and scaled_upper_triang_masked_softmax extensions of Megatron-LM.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mindspeed_llm.ops.registry import REFERENCE, implementation, register


def scaled_masked_softmax(scores: Tensor, mask: Tensor | None, scale: float, causal: bool = False) -> Tensor:
    """Probabilities of scores [..., s, s_k]; same shape and dtype.

    Args:
        mask: bool, broadcasts to scores, True where hidden; None hides nothing.
        scale: multiplies the scores.
        causal: query i of s does not see keys after i + s_k - s, either.

    Raises:
        ValueError: causal with more queries than keys: the first ones would see nothing.
    """
    if causal and scores.shape[-2] > scores.shape[-1]:
        raise ValueError(f"causal softmax of {scores.shape[-2]} queries over {scores.shape[-1]} keys; legal: no more")
    return implementation("scaled_masked_softmax")(scores, mask, scale, causal)


def _hidden(scores: Tensor, mask: Tensor | None, causal: bool) -> Tensor | None:
    """bool that broadcasts to scores, True where hidden; None when everything is visible."""
    if not causal:
        return mask
    queries, keys = scores.shape[-2:]
    later = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).triu(keys - queries + 1)
    return later if mask is None else later | mask


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@register("scaled_masked_softmax", "torch")
def torch_scaled_masked_softmax(scores: Tensor, mask: Tensor | None, scale: float, causal: bool = False) -> Tensor:
    """One wide copy of the scores, worked on in place; only the probabilities are saved."""
    return _Softmax.apply(scores, mask, scale, causal)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
        ctx.scale = scale
        wide = scores.to(_wide(scores.dtype)) * scale
        hidden = _hidden(scores, mask, causal)
        if hidden is not None:
            wide.masked_fill_(hidden, float("-inf"))
        probabilities = torch.softmax(wide, dim=-1)
        if mask is not None:
            # Rows that see nothing are 0 / 0 so far.
            probabilities.masked_fill_(hidden.all(dim=-1, keepdim=True), 0.0)
        probabilities = probabilities.to(scores.dtype)
        ctx.save_for_backward(probabilities)
        return probabilities

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (probabilities,) = ctx.saved_tensors
        return softmax_backward(grad, probabilities, ctx.scale), None, None, None


def softmax_backward(grad: Tensor, probabilities: Tensor, scale: float) -> Tensor:
    """Gradient of the scores from that of the probabilities, of their dtype; 0 where hidden."""
    wide = _wide(probabilities.dtype)
    inner = torch.ops.aten._softmax_backward_data(grad.to(wide), probabilities.to(wide), -1, wide)
    return inner.mul_(scale).to(probabilities.dtype)


@register("scaled_masked_softmax", REFERENCE, priority=-1)
def reference(scores: Tensor, mask: Tensor | None, scale: float, causal: bool = False) -> Tensor:
    """The formula, differentiated by autograd."""
    wide = scores.to(_wide(scores.dtype)) * scale
    hidden = _hidden(scores, mask, causal)
    visible = torch.ones_like(wide, dtype=torch.bool) if hidden is None else ~hidden.expand_as(wide)
    maximum = wide.masked_fill(~visible, float("-inf")).amax(-1, keepdim=True).clamp(min=-1e30)
    numerators = torch.where(visible, torch.exp(torch.where(visible, wide - maximum, 0)), 0)
    total = numerators.sum(-1, keepdim=True)
    return (numerators / torch.where(total == 0, 1, total)).to(scores.dtype)
