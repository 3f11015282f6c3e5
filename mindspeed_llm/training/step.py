"""One forward and backward pass over the micro-batches of a global batch, through megatron-core's schedules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from mindspeed_llm import accelerator
from mindspeed_llm.data.collate import MicroBatch


@dataclass
class BatchResult:
    """What a global batch gave, the same on every rank.

    Attributes:
        loss: mean over the trained tokens of the global batch; nan when there are none.
        trained_tokens, tokens: counts over the global batch (tokens: real ones, no padding).
        attention_pairs: sum of n (n + 1) / 2 over its documents.
    """

    loss: float
    trained_tokens: int
    tokens: int
    attention_pairs: int


def forward_step(batches: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    """megatron-core's forward_step: the model's output for the next micro-batch and the function from it to the loss.

    The model returns the sum of token losses; megatron-core divides the gradients by the global number of trained
    tokens (`calculate_per_token_loss`), so the split into micro-batches and ranks does not matter.
    """
    batch: MicroBatch = next(batches)
    device = accelerator.current().current_device()
    labels = batch.labels.to(device, non_blocking=True)
    output = model(
        input_ids=batch.input_ids.to(device, non_blocking=True),
        position_ids=batch.position_ids.to(device, non_blocking=True),
        attention_mask=None,
        labels=labels,
        packed_seq_params=packed_params(batch, device),
    )

    def loss_function(loss_sum: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        trained = torch.tensor(batch.num_trained_tokens, dtype=torch.int, device=device)
        return loss_sum, trained, {"lm loss": loss_sum.detach()}

    return output, loss_function


def packed_params(batch: MicroBatch, device: torch.device) -> Any:
    """megatron-core's description of a row with several documents, None for padded batches."""
    if batch.cu_seqlens is None:
        return None
    from megatron.core.packed_seq_params import PackedSeqParams

    bounds = batch.cu_seqlens.to(device, non_blocking=True)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_kv=batch.max_seqlen,
    )


def run_batch(chunks: list[torch.nn.Module], batches: list[MicroBatch], plan: Any, forward_only: bool) -> BatchResult:
    """Forward (and backward) of one global batch; gradients end up in the model, divided by the trained tokens."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    outputs = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=chunks,
        num_microbatches=len(batches),
        seq_length=plan.seq_length,
        micro_batch_size=1 if batches[0].cu_seqlens is not None else plan.config.training.micro_batch_size,
        forward_only=forward_only,
    )
    loss_sum = sum((o["lm loss"].double() for o in outputs), torch.zeros((), dtype=torch.float64))
    return _reduce(loss_sum, batches, parallel_state)


def _reduce(loss_sum: torch.Tensor, batches: list[MicroBatch], parallel_state: Any) -> BatchResult:
    """Sum over data-parallel ranks and hand the last stage's loss to everybody.

    Only the last stage has a loss and every stage counts the same tokens, so one sum over data-parallel ranks and one
    over stages (with the counts taken on the last stage alone) is all it takes.
    """
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    counts = [
        sum(b.num_trained_tokens for b in batches),
        sum(b.num_tokens for b in batches),
        sum(attention_pairs(b) for b in batches),
    ]
    device = accelerator.current().current_device()
    totals = torch.tensor([float(loss_sum), *counts] if last else [0.0] * 4, dtype=torch.float64, device=device)
    dist.all_reduce(totals, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        dist.all_reduce(totals, group=parallel_state.get_pipeline_model_parallel_group())
    loss, trained, tokens, pairs = totals.tolist()
    return BatchResult(loss / trained if trained else float("nan"), int(trained), int(tokens), int(pairs))


def attention_pairs(batch: MicroBatch) -> int:
    """Query-key pairs of causal attention inside the documents of a micro-batch."""
    if batch.cu_seqlens is None:
        rows, width = batch.input_ids.shape
        return rows * width * (width + 1) // 2
    lengths = batch.cu_seqlens.diff().long()
    return int((lengths * (lengths + 1) // 2).sum())
