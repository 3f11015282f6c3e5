"""The attention of a layer whose sequence is shared by the ranks of a context-parallel group."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from mindspeed_llm.ops.attention import attention, bounds_of
from mindspeed_llm.ops.attention_masked import check_mask, masked_attention
from mindspeed_llm.parallel.context_exchange import gather_heads, gather_tokens, repeat_key_heads
from mindspeed_llm.parallel.context_ring import Ring, RingProblem, ring_attention
from mindspeed_llm.parallel.context_split import SequenceSplit


class ContextParallelAttention(nn.Module):
    """softmax(scale q k^T) v over the whole sequence, for this rank's queries.

    Args:
        split: how the group shares sequences.
        group: the context-parallel group.
        exchange_group: the `split.ulysses` neighbours of this rank that exchange heads; None for a ring alone.
        ring_window: ranks of an inner ring, see `Ring`.
        window_size: of sliding-window attention, None without.
        scale: multiplies the scores; None for 1 / sqrt(d).
    """

    def __init__(
        self,
        split: SequenceSplit,
        group: dist.ProcessGroup,
        exchange_group: dist.ProcessGroup | None,
        *,
        ring_window: int = 1,
        window_size: int | None = None,
        scale: float | None = None,
    ):
        super().__init__()
        self.split, self.exchange_group = split, exchange_group
        self.ring = Ring(group, split, ring_window) if split.ring > 1 else None
        self.window_size, self.scale = window_size, scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """q [s, b, n, d], k [s, b, g, d], v [s, b, g, e] of this rank's tokens -> [s, b, n * e].

        Args:
            cu_seqlens: bounds of the documents of the whole sequence, as in ops.attention.
            hidden: mask of the whole sequence in place of causal order, as in ops.attention_masked.

        Raises:
            ValueError: the mask or `cu_seqlens` does not fit.
        """
        length = query.shape[0] * self.split.ranks
        group, num_heads = self.exchange_group, query.shape[2]
        if group is not None:
            key, value = repeat_key_heads(key, group.size()), repeat_key_heads(value, group.size())
            query, key, value = (gather_tokens(x, group) for x in (query, key, value))
        if hidden is None:
            context = self._attend(query, key, value, cu_seqlens, length)
        elif self.ring is None:
            context = masked_attention(query, key, value, hidden, scale=self.scale)
        else:
            context = self._attend_masked(query, key, value, hidden, length)
        if group is None:
            return context
        return gather_heads(context.unflatten(2, (num_heads // group.size(), -1)), group).flatten(2)

    def _attend_masked(self, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, length: int) -> Tensor:
        check_mask(hidden, query.shape[1], length, length)
        scale = query.shape[-1] ** -0.5 if self.scale is None else self.scale
        return ring_attention(query, key, value, RingProblem(self.ring, (0, length), None, scale, hidden))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor | None, length: int) -> Tensor:
        if self.ring is None:
            return attention(query, key, value, cu_seqlens=cu_seqlens, window_size=self.window_size, scale=self.scale)
        bounds = (0, length) if cu_seqlens is None else bounds_of(cu_seqlens)
        if bounds[-1] != length:
            raise ValueError(f"cu_seqlens ends at {bounds[-1]}, the ranks together hold {length} tokens")
        if cu_seqlens is not None and query.shape[1] != 1:
            raise ValueError(f"packed attention takes a batch of 1, not {query.shape[1]}")
        scale = query.shape[-1] ** -0.5 if self.scale is None else self.scale
        return ring_attention(query, key, value, RingProblem(self.ring, bounds, self.window_size, scale))
