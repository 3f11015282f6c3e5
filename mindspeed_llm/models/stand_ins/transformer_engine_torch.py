"""Transformer Engine's compiled module, as far as megatron splits packed rows among context-parallel ranks by it."""

from __future__ import annotations

import torch
from torch import Tensor

from mindspeed_llm.models.stand_ins.transformer_engine.pytorch.attention.rope import packed_positions


def thd_get_partitioned_indices(cu_seqlens: Tensor, total_tokens: int, world_size: int, rank: int) -> Tensor:
    """Which of the packed tokens a rank has, int32 [total_tokens / world_size].

    Args:
        cu_seqlens: bounds of the documents with their padding, from 0 to total_tokens.

    Raises:
        ValueError: the documents do not end at total_tokens, or one cannot be cut in 2 * world_size chunks.
    """
    bounds = cu_seqlens.tolist()
    if bounds[-1] != total_tokens:
        raise ValueError(f"cu_seqlens ends at {bounds[-1]}, not at total_tokens={total_tokens}")
    if uneven := [length for length in cu_seqlens.diff().tolist() if length % (2 * world_size)]:
        raise ValueError(f"documents of {uneven} tokens: {world_size} ranks share multiples of {2 * world_size}")
    starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff() // world_size)
    return (starts + packed_positions(cu_seqlens, world_size, rank)).to(torch.int32)
