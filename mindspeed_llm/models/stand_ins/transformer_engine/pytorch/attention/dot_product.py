"""Transformer Engine's DotProductAttention over our operators."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mindspeed_llm.models.stand_ins.transformer_engine.refusal import refuse
from mindspeed_llm.ops.attention import attention
from mindspeed_llm.ops.attention_masked import masked_attention
from mindspeed_llm.parallel.context_attention import ContextParallelAttention
from mindspeed_llm.parallel.context_split import SequenceSplit

MASK_TYPES = (
    "no_mask",
    "padding",
    "causal",
    "padding_causal",
    "causal_bottom_right",
    "padding_causal_bottom_right",
    "arbitrary",
)


def hidden_positions(
    mask_type: str, mask: Any, s: int, s_k: int, window: tuple[int, int], device: torch.device
) -> Tensor | None:
    """Which pairs do not take part, [b or 1, 1, s, s_k], true where hidden; None where all do.

    Args:
        mask_type: one of `MASK_TYPES`; causal ones align the first positions unless they say bottom_right.
        mask: hidden keys [b, 1, 1, s_k], or of queries and keys (a pair of such), or of all pairs.
        window: positions before and after that are seen, -1 for all.
    """
    row = torch.arange(s, device=device)[:, None] + (s_k - s if "bottom_right" in mask_type else 0)
    column = torch.arange(s_k, device=device)[None, :]
    hidden = torch.zeros(1, 1, s, s_k, dtype=torch.bool, device=device)
    if "causal" in mask_type:
        hidden = hidden | (column > row)
    if window[0] >= 0:
        hidden = hidden | (column < row - window[0])
    if window[1] >= 0:
        hidden = hidden | (column > row + window[1])
    if "padding" in mask_type and mask is not None:
        of_queries, of_keys = mask if isinstance(mask, tuple) else (None, mask)
        hidden = hidden | of_keys
        if of_queries is not None:
            hidden = hidden | of_queries.transpose(-1, -2)
    if mask_type == "arbitrary":
        hidden = hidden | mask
    return hidden if bool(hidden.any()) else None


def _with_bias(
    query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, bias: Tensor, dropout: float, scale: float
) -> Tensor:
    """Attention with a number added to every score: bias [1 or b, n, s, s_k]."""
    bias = bias.to(query.dtype)
    if hidden is not None:
        bias = bias.masked_fill(hidden, float("-inf"))
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=bias, dropout_p=dropout, scale=scale, enable_gqa=k.shape[1] != q.shape[1]
    )
    return out.permute(2, 0, 1, 3).flatten(2)


def _compute(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask_type: str,
    mask: Any,
    window: tuple[int, int],
    bias: Tensor | None,
    dropout: float,
    scale: float,
) -> Tensor:
    """[s, b, n, d], [s_k, b, g, d], [s_k, b, g, e] -> [s, b, n * e]."""
    s, s_k = query.shape[0], key.shape[0]
    plain = mask_type in ("causal", "padding_causal") and s == s_k and (mask is None or mask_type == "causal")
    if plain and bias is None and window[1] in (-1, 0):
        size = window[0] + 1 if window[0] >= 0 else None
        return attention(query, key, value, window_size=size, dropout=dropout, scale=scale)
    hidden = hidden_positions(mask_type, mask, s, s_k, window, query.device)
    if bias is not None:
        return _with_bias(query, key, value, hidden, bias, dropout, scale)
    if hidden is None:
        hidden = torch.zeros(1, 1, s, s_k, dtype=torch.bool, device=query.device)
    return masked_attention(query, key, value, hidden, dropout=dropout, scale=scale)


def _window(mask_type: str, window_size: tuple[int, int] | None) -> tuple[int, int]:
    """Positions before and after that are seen, -1 for all; a causal mask lets none be seen that come after."""
    before, after = (-1, -1) if window_size is None else window_size
    return (before, 0) if "causal" in mask_type else (before, after)


class DotProductAttention(nn.Module):
    """softmax(scale q k^T + bias) v in the layouts sbhd, bshd and thd, on one rank or over a context-parallel group."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int | tuple[int, int],
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None,
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        tp_group: Any = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        cp_group: Any = None,
        cp_global_ranks: Any = None,
        cp_stream: Any = None,
        cp_comm_type: str = "p2p",
        softmax_scale: float | None = None,
    ):
        super().__init__()
        head_dim = kv_channels[0] if isinstance(kv_channels, tuple) else kv_channels
        self.softmax_scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
        self.attention_dropout = attention_dropout
        self.qkv_format, self.attn_mask_type = qkv_format, attn_mask_type
        self.window_size = _window(attn_mask_type, window_size)
        forked = get_rng_state_tracker is not None and not sequence_parallel
        self.dropout_context = (lambda: get_rng_state_tracker().fork()) if forked else contextlib.nullcontext
        self.cp_comm_type = cp_comm_type
        self.set_context_parallel_group(cp_group, cp_global_ranks, cp_stream, cp_comm_type)

    def set_context_parallel_group(
        self, cp_group: Any, cp_global_ranks: Any = None, cp_stream: Any = None, cp_comm_type: str = "p2p"
    ) -> None:
        """Share sequences among the ranks of a group (None: each rank has its own).

        How they exchange keys (`cp_comm_type`) changes no value; ours pass them around a ring.
        """
        self.cp_group = cp_group

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        qkv_format: str | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        cu_seqlens_q_padded: Tensor | None = None,
        cu_seqlens_kv_padded: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
        window_size: tuple[int, int] | None = None,
        core_attention_bias_type: str = "no_bias",
        core_attention_bias: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """q [s, b, n, d], k [s_k, b, g, d], v [s_k, b, g, e] -> [s, b, n * e]; bshd and thd likewise in their order.

        Raises:
            UserError: ALiBi or biases before scaling; over ranks, a bias or packed documents with others' keys.
            ValueError: an unknown type of mask.
        """
        mask_type = attn_mask_type or self.attn_mask_type
        if mask_type not in MASK_TYPES:
            raise ValueError(f"attn_mask_type {mask_type!r} is wrong; legal: {', '.join(MASK_TYPES)}")
        if core_attention_bias_type not in ("no_bias", "post_scale_bias"):
            raise refuse(f"core_attention_bias_type={core_attention_bias_type}", "no_bias, post_scale_bias")
        if given := [name for name, value in options.items() if value is not None and name != "total_tokens"]:
            raise refuse(f"the attention option {', '.join(given)}", "attention without it")
        self._problem = (mask_type, _window(mask_type, self.window_size if window_size is None else window_size))
        bias = core_attention_bias if core_attention_bias_type == "post_scale_bias" else None
        layout = qkv_format or self.qkv_format
        if layout == "thd":
            bounds = [cu_seqlens_q, cu_seqlens_kv, cu_seqlens_q_padded, cu_seqlens_kv_padded]
            return self._packed(query, key, value, bounds)
        if layout == "bshd":
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        out = self._attend(query, key, value, attention_mask, bias)
        return out.transpose(0, 1).contiguous() if layout == "bshd" else out

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, bias: Tensor | None) -> Tensor:
        dropout = self.attention_dropout if self.training else 0.0
        mask_type, window = self._problem
        if self.cp_group is not None and self.cp_group.size() > 1:
            return self._over_ranks(query, key, value, mask, bias, dropout)
        with self.dropout_context() if dropout else contextlib.nullcontext():
            return _compute(query, key, value, mask_type, mask, window, bias, dropout, self.softmax_scale)

    def _over_ranks(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Any, bias: Tensor | None, dropout: float
    ) -> Tensor:
        mask_type, window = self._problem
        if bias is not None:
            raise refuse("context parallelism with an attention bias", "attention without it")
        if dropout or window[1] > 0:
            return self._over_gathered_keys(query, key, value, mask, dropout)
        ranks = self.cp_group.size()
        size = window[0] + 1 if window[0] >= 0 else None
        context = ContextParallelAttention(
            SequenceSplit(ranks, 1), self.cp_group, None, window_size=size, scale=self.softmax_scale
        )
        if mask_type == "causal" or (mask_type == "padding_causal" and mask is None):
            return context(query, key, value)
        whole = query.shape[0] * ranks
        hidden = hidden_positions(mask_type, mask, whole, whole, window, query.device)
        if hidden is None:
            hidden = torch.zeros(1, 1, whole, whole, dtype=torch.bool, device=query.device)
        return context(query, key, value, hidden=hidden)

    def _over_gathered_keys(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, dropout: float) -> Tensor:
        """What the ring has not, weights that are dropped and keys ahead: each rank gets all keys, and the mask."""
        from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

        mask_type, window = self._problem
        ranks, rank, whole = self.cp_group.size(), self.cp_group.rank(), query.shape[0] * self.cp_group.size()
        split = SequenceSplit(ranks)
        places = [torch.cat([torch.arange(*held) for held in split.ranges(each, whole)]) for each in range(ranks)]
        hidden = hidden_positions(mask_type, mask, whole, whole, window, query.device)
        if hidden is None:
            hidden = torch.zeros(1, 1, whole, whole, dtype=torch.bool, device=query.device)
        hidden = hidden[..., places[rank].to(query.device), :][..., torch.cat(places).to(query.device)]
        key, value = (gather_from_sequence_parallel_region(x, group=self.cp_group) for x in (key, value))
        with self.dropout_context() if dropout else contextlib.nullcontext():
            return masked_attention(query, key, value, hidden, dropout=dropout, scale=self.softmax_scale)

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, bounds: list[Tensor | None]) -> Tensor:
        """Documents one after the other, each by itself: [t, n, d] -> [t, n * e], zero between documents."""
        of_q, of_kv = bounds[0].tolist(), (bounds[1] if bounds[1] is not None else bounds[0]).tolist()
        at_q = of_q if bounds[2] is None else bounds[2].tolist()
        at_kv = of_kv if bounds[3] is None else bounds[3].tolist()
        if self.cp_group is not None and self.cp_group.size() > 1:
            if (of_q, at_q) != (of_kv, at_kv):
                raise refuse("cross attention between packed documents over ranks", "context_parallel_size=1")
            return self._packed_over_ranks(query, key, value, of_q, at_q)
        pieces, end = [], 0
        for index, (start, start_k) in enumerate(zip(at_q[:-1], at_kv[:-1])):
            length, length_k = of_q[index + 1] - of_q[index], of_kv[index + 1] - of_kv[index]
            if start > end:
                pieces.append(query.new_zeros(start - end, query.shape[1] * value.shape[2]))
            rows, keys = slice(start, start + length), slice(start_k, start_k + length_k)
            if length:
                document = (query[rows].unsqueeze(1), key[keys].unsqueeze(1), value[keys].unsqueeze(1))
                pieces.append(self._attend(*document, None, None).squeeze(1))
            end = start + length
        if end < query.shape[0]:
            pieces.append(query.new_zeros(query.shape[0] - end, query.shape[1] * value.shape[2]))
        return torch.cat(pieces)

    def _packed_over_ranks(
        self, query: Tensor, key: Tensor, value: Tensor, lengths: list[int], starts: list[int]
    ) -> Tensor:
        """As `_packed`, where each rank has its chunks of every document, one document after the other.

        Args:
            lengths: bounds of the documents, padding not counted.
            starts: bounds of the documents with their padding, on all ranks together.

        Raises:
            ValueError: the ranks cannot share the padded length of a document.
        """
        ranks, rank = self.cp_group.size(), self.cp_group.rank()
        causal, pieces = "causal" in self._problem[0], []
        if not causal:
            self._problem = ("padding", self._problem[1])
        for index, (start, stop) in enumerate(zip(starts, starts[1:])):
            if stop == start:
                continue
            length, whole = lengths[index + 1] - lengths[index], stop - start
            rows = slice(start // ranks, stop // ranks)
            held = torch.cat([torch.arange(*held) for held in SequenceSplit(ranks).ranges(rank, whole)])
            padding = (torch.arange(whole) >= length).to(query.device)
            # No token sees what comes after it; without causal order the padded keys have to be hidden.
            mask = None if causal or length == whole else padding.view(1, 1, 1, whole)
            document = self._attend(
                query[rows].unsqueeze(1), key[rows].unsqueeze(1), value[rows].unsqueeze(1), mask, None
            )
            pieces.append(document.squeeze(1).masked_fill(padding[held.to(query.device)].unsqueeze(1), 0.0))
        end = starts[-1] // ranks
        if end < query.shape[0]:
            pieces.append(query.new_zeros(query.shape[0] - end, query.shape[1] * value.shape[2]))
        return torch.cat(pieces)
