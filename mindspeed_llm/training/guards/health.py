"""Whether a checkpoint is one to go back to: nothing was wrong in the iteration that it ends with.

The norm of the embedding's gradient is MindSpore Transformers' sign of trouble ahead, `embedding_local_norm_threshold`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mindspeed_llm import accelerator
from mindspeed_llm.checkpoint.names import EMBEDDING
from mindspeed_llm.checkpoint.optimizer_state import own_states
from mindspeed_llm.parallel.exact_sum import sum_float64


def embedding_gradient_squares(chunks: list[torch.nn.Module], optimizer: Any) -> Tensor:
    """Sum of squares of this rank's share of the embedding's gradient, on the device, without waiting for it.

    Ranks that hold copies share the sum, so that all ranks together have it once.

    Args:
        optimizer: whose gradients are prepared, but not clipped.
    """
    from megatron.core import parallel_state

    device = accelerator.current().current_device()
    total = torch.zeros((), dtype=torch.float64, device=device)
    embeddings = {p for chunk in chunks for name, p in chunk.named_parameters() if name == EMBEDDING}
    if not parallel_state.is_pipeline_first_stage(ignore_virtual=True):
        return total  # a copy for multi-token prediction has the first stage's gradient
    copies = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    for state in own_states(optimizer):
        if state.parameter in embeddings and state.main is not None and state.main.grad is not None:
            total += state.main.grad.double().square().sum() / (1 if state.is_slice else copies)
    return total


def embedding_gradient_norm(squares: Tensor) -> float:
    """The norm over all ranks, from their `embedding_gradient_squares`."""
    total = squares.clone()
    sum_float64(total)
    return float(total.sqrt())
