"""All-to-all between ranks that share a sequence: from all heads of some tokens to some heads of all tokens, and back.

Source: DeepSpeed-Ulysses (Jacobs et al., arXiv 2309.14509).
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor


def gather_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[s / u, b, n, d] with consecutive tokens on consecutive ranks -> [s, b, n / u, d] with consecutive heads."""
    return _GatherTokens.apply(x, group)


def gather_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[s, b, n / u, d] -> [s / u, b, n, d], the inverse of `gather_tokens`."""
    return _GatherHeads.apply(x, group)


def repeat_key_heads(x: Tensor, ranks: int) -> Tensor:
    """Repeat the g key or value heads of [s, b, g, d] as little as makes `ranks` divide them, in the queries' order."""
    return x.repeat_interleave(ranks // math.gcd(ranks, x.shape[2]), dim=2)


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _to_tokens(x, group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _to_heads(grad, ctx.group), None


class _GatherHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _to_heads(x, group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _to_tokens(grad, ctx.group), None


def _to_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    by_rank = x.unflatten(2, (group.size(), -1)).permute(2, 0, 1, 3, 4).contiguous()
    return _exchanged(by_rank, group).flatten(0, 1)


def _to_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    by_rank = x.unflatten(0, (group.size(), -1)).contiguous()
    return _exchanged(by_rank, group).permute(1, 2, 0, 3, 4).flatten(2, 3).contiguous()


def _exchanged(by_rank: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Send slice i to rank i; slice i of the result came from rank i."""
    received = torch.empty_like(by_rank)
    dist.all_to_all_single(received, by_rank, group=group)
    return received
