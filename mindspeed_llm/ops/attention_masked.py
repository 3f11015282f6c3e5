"""Attention under a mask that says for every pair of positions whether it takes part; causal order only if it says so.

out_i = sum_j softmax_j(scale q_i k_j) v_j over the j that are not hidden from i; zero where all are.
The whole mask is read and the scores of all pairs are computed: causal, windowed and packed attention have a better
operator in `ops.attention`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mindspeed_llm.ops.registry import REFERENCE, implementation, register


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, *, dropout: float = 0.0, scale: float | None = None
) -> Tensor:
    """Attention to what is not hidden.

    Args:
        query: [s, b, n, d]; key: [s_k, b, g, d], value: [s_k, b, g, e] with n a multiple of g.
        hidden: bool [b or 1, 1, s, s_k], True where a query does not see a key (megatron-core's convention).
        dropout: probability of dropping an attention weight (0 outside training).
        scale: multiplies the scores; default 1 / sqrt(d).

    Returns:
        [s, b, n * e].

    Raises:
        ValueError: the mask is of another type or shape.
    """
    check_mask(hidden, query.shape[1], query.shape[0], key.shape[0])
    return implementation("masked_attention")(query, key, value, hidden, dropout, scale)


def check_mask(hidden: Tensor, b: int, s: int, s_k: int) -> None:
    """Refuse a mask that is not bool [b or 1, 1, s, s_k].

    Raises:
        ValueError: it is of another type or shape.
    """
    if hidden.dtype != torch.bool or hidden.shape not in ((1, 1, s, s_k), (b, 1, s, s_k)):
        raise ValueError(f"a mask must be bool [{b} or 1, 1, {s}, {s_k}], not {hidden.dtype} {list(hidden.shape)}")


@register("masked_attention", "sdpa")
def masked_sdpa(
    query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, dropout: float, scale: float | None
) -> Tensor:
    """torch's fused attention."""
    # What kernels give a query that sees nothing differs: let it see something and clear the result.
    blind = hidden.all(dim=-1, keepdim=True)
    # Elsewhere the answer would have to be waited for.
    all_see = hidden.device.type == "cpu" and not blind.any()
    context = F.scaled_dot_product_attention(
        query.permute(1, 2, 0, 3),
        key.permute(1, 2, 0, 3),
        value.permute(1, 2, 0, 3),
        attn_mask=~hidden if all_see else ~hidden | blind,
        dropout_p=dropout,
        scale=scale,
        enable_gqa=key.shape[2] != query.shape[2],
    )
    context = context if all_see else context.masked_fill(blind, 0.0)
    return context.permute(2, 0, 1, 3).flatten(2)


@register("masked_attention", REFERENCE, priority=-1)
def masked_scores(
    query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, dropout: float, scale: float | None
) -> Tensor:
    """The formula with every score in memory; softmax in fp32 at least."""
    repeats = query.shape[2] // key.shape[2]
    key, value = key.repeat_interleave(repeats, dim=2), value.repeat_interleave(repeats, dim=2)
    scores = torch.einsum("sbnd,tbnd->bnst", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    wide = torch.promote_types(query.dtype, torch.float32)
    lowest = torch.finfo(scores.dtype).min  # -inf would make a row that sees nothing nan
    weights = scores.masked_fill(hidden, lowest).softmax(-1, dtype=wide).masked_fill(hidden, 0.0).to(query.dtype)
    return torch.einsum("bnst,tbne->sbne", F.dropout(weights, dropout), value).flatten(2)
