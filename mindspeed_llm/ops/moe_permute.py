"""Rows of tokens in the order of their experts, and back: the first and the last step of a layer with experts.

    permute     rows[i] = tokens[token(i)], (expert, token) pairs of the routing map in lexical order
    unpermute   tokens[t] = sum over rows i of token t of p_i rows[i]      p: weights of the map's pairs, or 1

Sums of a token's rows are taken in fp32 at least and rounded once.
Replaces megatron.core.transformer.moe.moe_utils.permute and unpermute, whose fused form needs Transformer Engine's
kernels; theirs keeps a product of the rows' size for the backward pass, in the weights' type.

Legend: t tokens, e experts, r rows, h hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mindspeed_llm.ops.registry import REFERENCE, implementation, register
from mindspeed_llm.ops.row_blocks import row_blocks

# What the CPU's kernel for sums of embeddings adds in fp32.
BAG_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def row_order(routing_map: Tensor) -> tuple[Tensor, Tensor]:
    """Token [r] of each row, and its place [r] in the map [t, e] transposed and flattened."""
    places = routing_map.bool().t().flatten().nonzero().squeeze(1)
    return places % routing_map.shape[0], places


def moe_permute(
    tokens: Tensor, routing_map: Tensor, probs: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Rows by expert.

    Args:
        tokens: [t, h]; routing_map: [t, e], not 0 where a token goes to an expert; probs: [t, e] weights, or None.

    Returns:
        rows [r, h], their weights [r] or None, and the token of each row [r].
    """
    sources, places = row_order(routing_map)
    weights = None if probs is None else probs.t().reshape(-1).index_select(0, places)
    return implementation("moe_permute")(tokens, sources), weights, sources


def moe_unpermute(rows: Tensor, sources: Tensor, num_tokens: int, weights: Tensor | None = None) -> Tensor:
    """Sums of the rows of each token.

    Args:
        rows: [r, h]; sources: the token of each row [r]; weights: [r] of the rows, or None.

    Returns:
        [num_tokens, h] in the rows' type; 0 for a token without rows.
    """
    return implementation("moe_unpermute")(rows, sources, num_tokens, weights)


@register("moe_permute", "torch")
def gathered(tokens: Tensor, sources: Tensor) -> Tensor:
    """One gather; the gradient is the sum of `moe_unpermute`."""
    return _Permute.apply(tokens, sources)


@register("moe_unpermute", "torch")
def summed(rows: Tensor, sources: Tensor, num_tokens: int, weights: Tensor | None) -> Tensor:
    """Saves the rows alone; without weights, nothing."""
    return _Unpermute.apply(rows, sources, num_tokens, weights)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens: Tensor, sources: Tensor) -> Tensor:
        ctx.save_for_backward(sources)
        ctx.num_tokens = tokens.shape[0]
        return tokens.index_select(0, sources)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (sources,) = ctx.saved_tensors
        return _sums(grad, sources, ctx.num_tokens, None), None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, sources: Tensor, num_tokens: int, weights: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows if weights is not None else None, sources, weights)
        return _sums(rows, sources, num_tokens, weights)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, Tensor | None]:
        rows, sources, weights = ctx.saved_tensors
        if weights is None:
            return grad.index_select(0, sources), None, None, None
        grad_rows, grad_weights = torch.empty_like(rows), torch.empty_like(weights)
        wide = torch.promote_types(rows.dtype, torch.float32)
        for block in row_blocks(*rows.shape, rows, wide):
            by_row = grad.index_select(0, sources[block]).to(wide)
            grad_weights[block] = torch.linalg.vecdot(by_row, rows[block].to(wide))
            grad_rows[block] = by_row.mul_(weights[block, None])
        return grad_rows, None, None, grad_weights


def _sums(rows: Tensor, sources: Tensor, num_tokens: int, weights: Tensor | None) -> Tensor:
    """[r, h] -> [num_tokens, h]: sums of a token's rows.

    On a CPU one row after another. Elsewhere in no fixed order, unless torch is told to be deterministic.
    """
    if weights is None and rows.device.type == "cpu" and rows.dtype in BAG_DTYPES and len(rows):
        return _bags(rows, sources, num_tokens)
    wide = torch.promote_types(rows.dtype, torch.float32)
    out = rows.new_zeros(num_tokens, rows.shape[1], dtype=wide)
    for block in row_blocks(*rows.shape, rows, wide):
        own = rows[block].to(wide)
        out.index_add_(0, sources[block], own if weights is None else own * weights[block, None].to(wide))
    return out.to(rows.dtype)


def _bags(rows: Tensor, sources: Tensor, num_tokens: int) -> Tensor:
    """As sums of embeddings, whose kernel reads a row and writes a sum once and adds in fp32."""
    order = sources.argsort(stable=True)
    starts = torch.bincount(sources, minlength=num_tokens).cumsum(0).roll(1)
    starts[:1] = 0
    return torch.nn.functional.embedding_bag(order, rows.contiguous(), starts, mode="sum")


@register("moe_permute", REFERENCE, priority=-1)
def permute_reference(tokens: Tensor, sources: Tensor) -> Tensor:
    """The formula, differentiated by autograd."""
    return tokens[sources]


@register("moe_unpermute", REFERENCE, priority=-1)
def unpermute_reference(rows: Tensor, sources: Tensor, num_tokens: int, weights: Tensor | None) -> Tensor:
    """The formula as a product with a matrix of zeros and weights, differentiated by autograd."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    chosen = (torch.arange(num_tokens, device=rows.device)[:, None] == sources).to(wide)
    if weights is not None:
        chosen = chosen * weights.to(wide)
    return (chosen @ rows.to(wide)).to(rows.dtype)
