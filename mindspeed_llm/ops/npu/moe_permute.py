"""Sums of each token's rows by `npu_moe_token_unpermute_with_routing_map`: read once, added in fp32, written once.

torch's `index_add_` needs an fp32 copy of the rows and adds them in any order. Bringing tokens to rows stays torch's
gather, a single kernel too: torch_npu's own asks that all tokens have equally many rows, which experts on other ranks
and dropped tokens do not give. Weighted rows would be rounded before the kernel adds them: they are left to torch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from mindspeed_llm.ops.moe_permute import gathered, summed
from mindspeed_llm.ops.npu.kernels import DEVICES, FLOATS, REQUIRES
from mindspeed_llm.ops.registry import register

# Limit of the kernel: rows of a token.
MOST_ROWS = 512
# The rows of each token, by the tokens of the rows: both directions of a layer use them, and counting waits for the
# device.
_slots_of: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def slots_of(sources: Tensor, num_tokens: int) -> Tensor:
    """The rows of each token, int32 [num_tokens k] in order; -1 where a token has fewer than k, the most of any.

    Args:
        sources: the token of each row [r].
    """
    known = _slots_of.get(sources)
    if known is None or known[0] != num_tokens:
        counts = torch.bincount(sources, minlength=num_tokens)
        order = torch.argsort(sources, stable=True)
        tokens = sources[order]
        most = int(counts.max())
        number = torch.arange(sources.numel(), device=sources.device) - (counts.cumsum(0) - counts)[tokens]
        slots = torch.full((num_tokens * most,), -1, dtype=torch.int32, device=sources.device)
        known = num_tokens, slots.scatter_(0, tokens * most + number, order.int())
        _slots_of[sources] = known
    return known[1]


def _sums(rows: Tensor, slots: Tensor, num_tokens: int) -> Tensor:
    shape = [num_tokens, rows.shape[1]]
    return torch.ops.npu.npu_moe_token_unpermute_with_routing_map(rows.contiguous(), slots, shape)


def _fits(rows: Tensor, sources: Tensor, num_tokens: int) -> bool:
    if rows.dtype not in FLOATS or sources.numel() == 0:
        return False
    return slots_of(sources, num_tokens).numel() <= num_tokens * MOST_ROWS


@register("moe_permute", "npu_moe_token_unpermute", devices=DEVICES, requires=REQUIRES, priority=1)
def npu_permute(tokens: Tensor, sources: Tensor) -> Tensor:
    """One gather; the kernel adds up the gradients of a token's rows."""
    if not _fits(tokens, sources, tokens.shape[0]):
        return gathered(tokens, sources)
    return _Permute.apply(tokens, sources, slots_of(sources, tokens.shape[0]))


@register("moe_unpermute", "npu_moe_token_unpermute", devices=DEVICES, requires=REQUIRES, priority=1)
def npu_unpermute(rows: Tensor, sources: Tensor, num_tokens: int, weights: Tensor | None) -> Tensor:
    """As `ops.moe_permute.moe_unpermute`."""
    if weights is not None or not _fits(rows, sources, num_tokens):
        return summed(rows, sources, num_tokens, weights)
    return _Unpermute.apply(rows, sources, slots_of(sources, num_tokens), num_tokens)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens: Tensor, sources: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.num_tokens = tokens.shape[0]
        return tokens.index_select(0, sources)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (slots,) = ctx.saved_tensors
        return _sums(grad, slots, ctx.num_tokens), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, sources: Tensor, slots: Tensor, num_tokens: int) -> Tensor:
        ctx.save_for_backward(sources)
        return _sums(rows, slots, num_tokens)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (sources,) = ctx.saved_tensors
        return grad.index_select(0, sources), None, None, None
