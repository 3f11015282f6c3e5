"""What multi-token prediction is trained on: tokens and labels moved ahead, and how its losses join the model's.

The k-th prediction layer reads token i + k at position i and is to say the token after it. A position for which one of
the two lies outside its document has no loss. What such a position computes reaches no other: attention looks back, and
a document's last positions are seen by none before them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mindspeed_llm.ops.cross_entropy import IGNORE_INDEX

# Stands where no token follows; such positions have no loss, so any id of the vocabulary would do.
NO_TOKEN = 0


def next_tokens(ids: Tensor, cu_seqlens: Tensor | None, fill: int) -> Tensor:
    """[b, s] moved one position to the left; `fill` at the end of each row and each packed document.

    Args:
        cu_seqlens: bounds of the documents of a packed row, None where a row is one document.
    """
    moved = torch.full_like(ids, fill)
    moved[:, :-1] = ids[:, 1:]
    if cu_seqlens is not None:
        ends = cu_seqlens[1:].to(ids.device, torch.long)
        moved[:, ends[ends > 0] - 1] = fill
    return moved


def further_targets(
    input_ids: Tensor, labels: Tensor, cu_seqlens: Tensor | None, count: int
) -> list[tuple[Tensor, Tensor]]:
    """(token ids, labels) [b, s] of each of `count` prediction layers, from those of the model itself.

    Of whole rows: a rank that holds a part of a sequence does not have its neighbour's first token.
    """
    targets = []
    for _ in range(count):
        input_ids = next_tokens(input_ids, cu_seqlens, NO_TOKEN)
        labels = next_tokens(labels, cu_seqlens, IGNORE_INDEX)
        targets.append((input_ids, labels))
    return targets


def objective(losses: Tensor, scaling_factor: float) -> Tensor:
    """What is minimised: the model's loss plus `scaling_factor` times the mean of the prediction layers'.

    Args:
        losses: [1 + prediction layers] sums over the labelled tokens, or the model's alone, a scalar.
    """
    if losses.dim() == 0:
        return losses
    return losses[0] + scaling_factor * losses[1:].mean()
