"""Causal softmax attention without an explicit mask: softmax(q k^T / sqrt(d)) v, each token seeing itself and before.

With a soft cap c the scores S become c tanh(S / c); with a sink z per head exp(z) is added to each row's sum of
exponentials, so that its weights add up to less than 1.

Legend: s sequence, b batch, n query heads, g key/value heads, d head dim, e value's (d but for latent attention),
t packed tokens. Inside, q is [s, b, n, d], k [s_k, b, g, d], v [s_k, b, g, e] with s_k >= s, the queries being the last
s of the s_k positions; packed documents follow each other in a batch of one. Other layouts are views of this one.
A document is computed by itself, from its own rows only, so no value of another document can reach it.
Sources: soft cap: Gemma 2 (arXiv 2408.00118); sinks: gpt-oss, megatron-core's `softmax_type`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from mindspeed_llm import accelerator
from mindspeed_llm.ops.registry import REFERENCE, implementation, implementations, register

# What an implementation can do beyond causal attention of the newest queries; a call goes to the best that can do all
# it asks for. Types and sizes that a kernel does not take it hands on by itself.
DROPOUT, SOFTCAP, SINKS = "dropout", "softcap", "sinks"
ABILITIES: dict[str, frozenset[str]] = {
    REFERENCE: frozenset({DROPOUT, SOFTCAP, SINKS}),
    "rows": frozenset({SOFTCAP, SINKS}),
    "sdpa": frozenset({DROPOUT}),
    "blocks": frozenset({DROPOUT}),
    "flash_attn": frozenset({DROPOUT, SOFTCAP}),
    "npu_fusion_attention": frozenset({DROPOUT}),
}

# Layout -> where its dimensions stand in [s, b, heads, channels]; H stands for heads and channels in one.
LAYOUTS = {"SBND": (0, 1, 2, 3), "BSND": (1, 0, 2, 3), "BNSD": (2, 0, 1, 3), "SBH": (0, 1), "BSH": (1, 0), "TND": ()}


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    window_size: int | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    layout: str = "SBND",
    num_heads: tuple[int, int] | None = None,
) -> Tensor:
    """Causal attention, of packed documents when `cu_seqlens` is given.

    Args:
        query: [s, b, n, d]; key: [s_k, b, g, d], value: [s_k, b, g, e] with n a multiple of g; or in `layout`.
        cu_seqlens: integer [documents + 1], starts of the documents and the total; s must be the total and b 1.
        window_size: a token sees itself and the window_size - 1 tokens before; None for all before.
        dropout: probability of dropping an attention weight (0 outside training).
        scale: multiplies the scores; default 1 / sqrt(d).
        softcap: scores stay below it in absolute value; None for no bound.
        sinks: [n], a logit per head that takes part in every row's sum; None for none.
        layout: one of `LAYOUTS`, of the inputs and the output; TND is [t, n, d].
        num_heads: n and g, for SBH and BSH.

    Returns:
        [s, b, n * e], in the order of `layout`: [b, s, n * e] for BSND and BSH, [b, n, s, e] for BNSD, [t, n * e] for
        TND.

    Raises:
        ValueError: the layout is unknown, or the documents do not fill the row.
    """
    if layout != "SBND":
        inner = [_to_sbnd(x, layout, heads) for x, heads in zip((query, key, value), _heads(num_heads))]
        options = dict(cu_seqlens=cu_seqlens, window_size=window_size, dropout=dropout, scale=scale)
        out = attention(*inner, **options, softcap=softcap, sinks=sinks)
        return _from_sbnd(out, layout, inner[0].shape[2])
    extra = {SOFTCAP: softcap, SINKS: sinks}
    extra = {name: value for name, value in extra.items() if value is not None}
    if cu_seqlens is None:
        run = able(dropout, extra)
        return run(query, key, value, window_size, dropout, scale, **extra)
    if query.shape[1] != 1:
        raise ValueError(f"packed attention takes a batch of 1, not {query.shape[1]}")
    lengths = [stop - start for start, stop in pairwise(bounds_of(cu_seqlens))]
    if sum(lengths) != query.shape[0] or query.shape[0] != key.shape[0]:
        raise ValueError(f"cu_seqlens ends at {sum(lengths)}, the packed row has {query.shape[0]} tokens")
    lengths = [length for length in lengths if length]
    if extra:
        return by_document(query, key, value, lengths, window_size, dropout, scale, **extra)
    return implementation("packed_attention")(query, key, value, lengths, window_size, dropout, scale)


# Bounds that were read, with the version of the tensor.
_bounds: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def bounds_of(cu_seqlens: Tensor) -> tuple[int, ...]:
    """The numbers in `cu_seqlens`, read once for all layers: to read them is to wait for the device."""
    if cu_seqlens.is_inference():  # whose changes are not counted
        return tuple(cu_seqlens.tolist())
    known = _bounds.get(cu_seqlens)
    if known is None or known[0] != cu_seqlens._version:
        known = _bounds[cu_seqlens] = cu_seqlens._version, tuple(cu_seqlens.tolist())
    return known[1]


def able(dropout: float, extra: Iterable[str] = ()) -> Callable[..., Tensor]:
    """The chosen implementation, or else the best one that can do all that a call asks for."""
    chosen, needs = implementation("attention"), frozenset(extra) | ({DROPOUT} if dropout else set())
    return _best(chosen, needs, accelerator.current().device_type) if needs else chosen


@functools.cache
def _best(chosen: Callable[..., Tensor], needs: frozenset[str], device_type: str) -> Callable[..., Tensor]:
    usable = [entry for entry in implementations("attention") if entry.missing(device_type) is None]
    able = [entry for entry in usable if needs <= ABILITIES[entry.name]]
    if any(entry.function is chosen for entry in able):
        return chosen
    return max(able, key=lambda entry: entry.priority).function


def _heads(num_heads: tuple[int, int] | None) -> tuple[int | None, int | None, int | None]:
    """Heads of query, key and value."""
    return (None, None, None) if num_heads is None else (num_heads[0], num_heads[1], num_heads[1])


def _to_sbnd(x: Tensor, layout: str, heads: int | None) -> Tensor:
    """A view [s, b, heads, channels] of a tensor in `layout`."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is wrong; legal: {', '.join(LAYOUTS)}")
    if layout == "TND":
        return x.unsqueeze(1)
    if layout in ("SBH", "BSH"):
        if heads is None:
            raise ValueError(f"layout {layout} needs num_heads")
        return x.unflatten(2, (heads, -1)).permute(*LAYOUTS[layout], 2, 3)
    return x.permute(LAYOUTS[layout])


def _from_sbnd(out: Tensor, layout: str, heads: int) -> Tensor:
    """[s, b, heads * channels] in the order of `layout`."""
    if layout == "TND":
        return out.squeeze(1)
    if layout == "BNSD":
        return out.unflatten(2, (heads, -1)).permute(1, 2, 0, 3)
    return out.transpose(0, 1) if layout in ("BSND", "BSH") else out


@register("packed_attention", "by_document")
def by_document(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: list[int],
    window_size: int | None,
    dropout: float,
    scale: float | None,
    **extra: Any,
) -> Tensor:
    """A call of the operator `attention` for each document; `lengths` are theirs, none of them 0."""
    run = able(dropout, extra)
    # split's backward is one concatenation; slicing would write a zero-filled row for every document.
    documents = zip(query.split(lengths), key.split(lengths), value.split(lengths))
    outs = [run(q, k, v, window_size, dropout, scale, **extra) for q, k, v in documents]
    return torch.cat(outs) if outs else query.new_zeros(0, 1, query.shape[2] * value.shape[3])


@register("attention", "sdpa")
def sdpa(
    query: Tensor, key: Tensor, value: Tensor, window_size: int | None, dropout: float, scale: float | None
) -> Tensor:
    """torch's fused attention; a mask is built only for a window shorter than the sequence or queries after a cache."""
    s, b, n, _ = query.shape
    s_k, g = key.shape[0], key.shape[2]
    mask = None
    if (window_size is not None and s_k > window_size) or (s_k != s and s != 1):
        mask = visible(s, s_k, window_size, query.device)
    context = F.scaled_dot_product_attention(
        query.permute(1, 2, 0, 3),
        key.permute(1, 2, 0, 3),
        value.permute(1, 2, 0, 3),
        attn_mask=mask,
        is_causal=mask is None and s > 1,
        dropout_p=dropout,
        scale=scale,
        enable_gqa=g != n,
    )
    return context.permute(2, 0, 1, 3).reshape(s, b, -1)


def visible(s: int, s_k: int, window_size: int | None, device: torch.device) -> Tensor:
    """Boolean [s, s_k]: which of the s_k positions each of the last s may see."""
    query_position = torch.arange(s_k - s, s_k, device=device)[:, None]
    key_position = torch.arange(s_k, device=device)[None, :]
    seen = key_position <= query_position
    return seen if window_size is None else seen & (key_position > query_position - window_size)


@register("attention", REFERENCE, priority=-2)
def all_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: int | None,
    dropout: float,
    scale: float | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The formula with every score in memory, differentiated by autograd."""
    options = dict(window_size=window_size, dropout=dropout, scale=scale, softcap=softcap, sinks=sinks)
    return reference(query, key, value, **options)


@register("packed_attention", REFERENCE, priority=-1)
def one_mask(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: list[int],
    window_size: int | None,
    dropout: float,
    scale: float | None,
) -> Tensor:
    """The formula with every score of the whole row in memory."""
    bounds = torch.tensor([0, *lengths], device=query.device).cumsum(0)
    return reference(query, key, value, cu_seqlens=bounds, window_size=window_size, dropout=dropout, scale=scale)


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    window_size: int | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The formula, with one mask that also separates the documents; softmax in fp32 at least."""
    s, b, n, d = query.shape
    s_k, repeats = key.shape[0], n // key.shape[2]
    key, value = key.repeat_interleave(repeats, dim=2), value.repeat_interleave(repeats, dim=2)
    scores = torch.einsum("sbnd,tbnd->bnst", query, key) * (d**-0.5 if scale is None else scale)
    seen = visible(s, s_k, window_size, query.device)
    if cu_seqlens is not None:
        document = torch.bucketize(torch.arange(s_k, device=query.device), cu_seqlens[1:], right=True)
        seen = seen & (document[-s:, None] == document[None, :])
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(scores.dtype)[:, None, None].expand(b, n, s, 1)), dim=-1)
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    weights = scores.softmax(-1, dtype=wide)[..., :s_k].to(query.dtype)
    weights = F.dropout(weights, dropout)
    return torch.einsum("bnst,tbne->sbne", weights, value).reshape(s, b, -1)
