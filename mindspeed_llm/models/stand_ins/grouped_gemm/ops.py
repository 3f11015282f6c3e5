"""One product for each group of rows."""

from __future__ import annotations

from torch import Tensor

from mindspeed_llm.ops.grouped_matmul import grouped_matmul


def gmm(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_b: bool = False) -> Tensor:
    """Rows a [t, k] in groups of batch_sizes [g], times b [g, k, n] ([g, n, k] where trans_b) -> [t, n]."""
    return grouped_matmul(a, b if trans_b else b.transpose(1, 2), batch_sizes.cpu())
