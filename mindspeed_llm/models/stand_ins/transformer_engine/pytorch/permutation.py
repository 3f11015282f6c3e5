"""Transformer Engine's orders of tokens in a layer with experts: by expert and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _sources(routing_map: Tensor) -> tuple[Tensor, Tensor]:
    """The token of each row sorted by expert, and where (expert, token) it stands in the transposed map."""
    by_expert = routing_map.bool().t().contiguous()
    places = by_expert.flatten().nonzero().squeeze(1)
    return places % routing_map.shape[0], places


def moe_permute(
    tokens: Tensor, routing_map: Tensor, num_out_tokens: int = -1, max_token_num: int = -1, map_type: str = "mask"
) -> tuple[Tensor, Tensor]:
    """Tokens [t, h] and a map [t, experts] -> rows sorted by expert, and the (token, place) of each row [2, rows].

    Raises:
        ValueError: a map that is not a mask.
    """
    if map_type != "mask":
        raise ValueError(f"map_type {map_type!r} is wrong; legal: mask")
    sources, places = _sources(routing_map)
    return tokens.index_select(0, sources), torch.stack((sources, places))


def moe_permute_with_probs(
    tokens: Tensor, probs: Tensor, routing_map: Tensor, num_out_tokens: int = -1
) -> tuple[Tensor, Tensor, Tensor]:
    """As `moe_permute`, with the probability [t, experts] of each row between."""
    rows, row_map = moe_permute(tokens, routing_map, num_out_tokens)
    return rows, probs.t().flatten().index_select(0, row_map[1]), row_map


def moe_unpermute(
    rows: Tensor,
    row_map: Tensor,
    merging_probs: Tensor | None = None,
    restore_shape: Any = None,
    map_type: str = "mask",
    probs: Tensor | None = None,
) -> Tensor:
    """The sum of a token's rows, weighted by merging_probs [t, experts] if given -> restore_shape."""
    merging_probs = probs if merging_probs is None else merging_probs
    weighted = rows
    if merging_probs is not None:
        weighted = rows * merging_probs.t().flatten().index_select(0, row_map[1]).unsqueeze(1)
    shape = rows.shape if restore_shape is None else restore_shape
    return weighted.new_zeros(shape).index_add(0, row_map[0], weighted).to(rows.dtype)


def moe_sort_chunks_by_index(rows: Tensor, split_sizes: Tensor, sorted_index: Tensor) -> Tensor:
    """Chunks of rows of the given sizes, in another order."""
    chunks = rows.split(split_sizes.tolist())
    return torch.cat([chunks[index] for index in sorted_index.tolist()])


def moe_sort_chunks_by_index_with_probs(
    rows: Tensor, probs: Tensor, split_sizes: Tensor, sorted_index: Tensor
) -> tuple[Tensor, Tensor]:
    """As `moe_sort_chunks_by_index`, for rows and a number beside each."""
    return tuple(moe_sort_chunks_by_index(x, split_sizes, sorted_index) for x in (rows, probs))
