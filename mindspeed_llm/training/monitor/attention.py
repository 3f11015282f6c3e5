"""The largest attention score of every layer: growing ones announce a loss that diverges (arXiv 2309.14322, section 3).

The operators never form the scores, so they are computed once more, a block of queries at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_llm import accelerator
from mindspeed_llm.models.attention import CoreAttention
from mindspeed_llm.training.monitor.places import PlacedChunk, Places

QUERIES_AT_ONCE = 512
MAX_LOGIT = "max_attention_logit"


class MaxAttentionLogit:
    """Watches the core attentions in the iterations that `recording` is set for.

    Args:
        chunks: of this rank.
    """

    def __init__(self, chunks: Sequence[PlacedChunk], places: Places) -> None:
        self.recording = False
        self.names = places.names[: places.num_attentions]
        device = accelerator.current().current_device()
        self.found = torch.full((places.num_attentions,), -math.inf, device=device)
        self._hooks = [
            attention.register_forward_pre_hook(self._watcher(place), with_kwargs=True)
            for chunk in chunks
            for place, attention in chunk.modules(CoreAttention)
        ]

    def _watcher(self, place: int) -> Any:
        def look(attention: torch.nn.Module, inputs: tuple, named: dict[str, Any]) -> None:
            if not (self.recording and attention.training and torch.is_grad_enabled()):
                return
            query, key, _, *rest = inputs
            names = ("cu_seqlens", "hidden")
            options = {name: named.get(name) for name in names} | dict(zip(names, rest))
            with torch.no_grad():
                highest = max_logit(
                    query.detach(),
                    key.detach(),
                    scale=attention.scale,
                    window_size=attention.window_size,
                    **options,
                )
            self.found[place] = torch.maximum(self.found[place], highest)

        return look

    def measure(self) -> dict[str, float]:
        """Largest score by layer and of all, over all ranks; a collective call that starts anew."""
        dist.all_reduce(self.found, op=dist.ReduceOp.MAX)
        highest = self.found.tolist()
        self.found.fill_(-math.inf)
        return {MAX_LOGIT: max(highest)} | {f"{MAX_LOGIT}/{name}": value for name, value in zip(self.names, highest)}

    def close(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()


def max_logit(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None,
    window_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    hidden: Tensor | None = None,
) -> Tensor:
    """max of scale q k^T over the pairs that attention looks at, float32 [].

    Args:
        query: [s, b, n, d]; key: [s, b, g, d] with n a multiple of g; as in ops.attention.
        scale: None for 1 / sqrt(d).
        window_size, cu_seqlens: as in ops.attention; hidden: as in ops.attention_masked, in place of causal order.
    """
    s, _, n, d = query.shape
    scale = d**-0.5 if scale is None else scale
    keys = key.float().repeat_interleave(n // key.shape[2], dim=2)
    position = torch.arange(s, device=query.device)
    document = position.new_zeros(s)
    if cu_seqlens is not None:
        document = torch.bucketize(position, cu_seqlens.to(position)[1:], right=True)
    highest = torch.tensor(-math.inf, device=query.device)
    for first in range(0, s, QUERIES_AT_ONCE):
        rows = slice(first, min(first + QUERIES_AT_ONCE, s))
        scores = torch.einsum("qbnd,kbnd->bnqk", query[rows].float(), keys) * scale
        unseen = _unseen(position, document, rows, window_size) if hidden is None else hidden[:, :, rows]
        highest = torch.maximum(highest, scores.masked_fill(unseen, -math.inf).amax())
    return highest


def _unseen(position: Tensor, document: Tensor, rows: slice, window_size: int | None) -> Tensor:
    """[queries, s] True where a query does not see a key: after it, too far before it, in another document."""
    distance = position[rows, None] - position[None, :]
    unseen = (distance < 0) | (document[rows, None] != document[None, :])
    return unseen if window_size is None else unseen | (distance >= window_size)
