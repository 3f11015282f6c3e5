"""One forward and backward pass over the micro-batches of a global batch, through megatron-core's schedules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist

from mindspeed_llm import accelerator
from mindspeed_llm.data.collate import MicroBatch
from mindspeed_llm.data.record import IGNORE_INDEX
from mindspeed_llm.models.prediction_targets import further_targets, objective
from mindspeed_llm.parallel import watch
from mindspeed_llm.parallel.context_split import SequenceSplit
from mindspeed_llm.parallel.exact_sum import sum_float64


@dataclass
class BatchResult:
    """What a global batch gave, the same on every rank.

    Attributes:
        loss: mean over the trained tokens of the global batch; nan when there are none.
        trained_tokens, tokens: counts over the global batch (tokens: real ones, no padding).
        attention_pairs: sum of n (n + 1) / 2 over its documents.
        mtp_loss: mean loss of the multi-token prediction layers over the tokens they predict; None without any.
        auxiliary_losses: of the routers of experts, by name: mean over layers and micro-batches, without coefficients.
        flags: sums over all ranks of what each told the others with its loss.
        own_losses: summed over the tokens of each of this rank's micro-batches, still on the device; empty but on the
            last stage.
        own_trained_tokens: summed over those micro-batches; 0 but on the last stage.
    """

    loss: float
    trained_tokens: int
    tokens: int
    attention_pairs: int
    mtp_loss: float | None = None
    auxiliary_losses: dict[str, float] = field(default_factory=dict)
    flags: dict[str, float] = field(default_factory=dict)
    own_losses: list[torch.Tensor] = field(default_factory=list)
    own_trained_tokens: int = 0

    @property
    def further_losses(self) -> dict[str, float]:
        """Losses beside the language model's, by the names they are logged under."""
        predicted = {} if self.mtp_loss is None else {"mtp loss": self.mtp_loss}
        return predicted | self.auxiliary_losses


def forward_step(batches: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    """megatron-core's forward_step: the model's output for the next micro-batch and the function from it to the loss.

    The model returns the sum of token losses; megatron-core divides the gradients by the global number of trained
    tokens (`calculate_per_token_loss`), so the split into micro-batches and ranks does not matter. The losses of
    multi-token prediction are divided by the same number.
    """
    whole, config = next(batches), model.config
    batch = own_share(whole, config.sequence_split)
    device = accelerator.current().current_device()
    further = [
        tuple(own_tokens(x, config.sequence_split).to(device, non_blocking=True) for x in pair)
        for pair in further_targets(whole.input_ids, whole.labels, whole.cu_seqlens, config.shape.mtp_num_layers)
    ]
    # Routers of experts alone tell padding apart; they need to agree on whether there is any.
    padded = config.num_moe_experts is not None and bool(whole.padding.any())
    labels = batch.labels.to(device, non_blocking=True)
    output = model(
        input_ids=batch.input_ids.to(device, non_blocking=True),
        position_ids=batch.position_ids.to(device, non_blocking=True),
        attention_mask=None,
        labels=labels,
        packed_seq_params=packed_params(batch, device),
        further=further,
        padding_mask=batch.padding.to(device, non_blocking=True) if padded else None,
    )

    def loss_function(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        trained = torch.tensor(batch.num_trained_tokens, dtype=torch.int, device=device)
        sums = losses.detach().double().reshape(-1)
        predicted = sum(int((targets != IGNORE_INDEX).sum()) for _, targets in further)
        logged = {"lm loss": sums[0], "mtp loss": sums[1:].sum(), "mtp tokens": torch.tensor(predicted)}
        logged["trained tokens"] = torch.tensor(batch.num_trained_tokens)
        return objective(losses, config.mtp_loss_scaling_factor), trained, logged

    return output, loss_function


def own_share(batch: MicroBatch, split: SequenceSplit) -> MicroBatch:
    """The tokens that this context-parallel rank holds; bounds of documents and `num_tokens` stay the whole row's."""
    if split.ranks == 1:
        return batch
    labels = own_tokens(batch.labels, split)
    return replace(
        batch,
        input_ids=own_tokens(batch.input_ids, split),
        labels=labels,
        position_ids=own_tokens(batch.position_ids, split),
        padding=own_tokens(batch.padding, split),
        num_trained_tokens=int((labels != IGNORE_INDEX).sum()),
    )


def own_tokens(x: torch.Tensor, split: SequenceSplit) -> torch.Tensor:
    """The columns of x [b, s] that this context-parallel rank holds."""
    from megatron.core import parallel_state

    if split.ranks == 1:
        return x
    ranges = split.ranges(parallel_state.get_context_parallel_rank(), x.shape[1])
    return torch.cat([x[:, start:stop] for start, stop in ranges], dim=1)


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


def run_batch(
    chunks: list[torch.nn.Module],
    batches: list[MicroBatch],
    plan: Any,
    forward_only: bool,
    flags: Callable[[], Mapping[str, float]] = dict,
) -> BatchResult:
    """Forward (and backward) of one global batch; gradients end up in the model, divided by the trained tokens.

    Args:
        flags: read when the backward pass has ended; numbers that every rank adds to `BatchResult.flags`, the same
            names on all ranks. They travel with the loss.
    """
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from mindspeed_llm.models.moe import auxiliary_loss

    watch.beat()
    balanced = not forward_only and auxiliary_loss.is_enabled(chunks)
    num_micro_batches = len(batches) * parallel_state.get_data_parallel_world_size()
    if balanced:
        auxiliary_loss.set_weights(chunks, _all_trained_tokens(batches), num_micro_batches)
    outputs = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches) if len(chunks) == 1 else [iter(batches) for _ in chunks],
        model=chunks,
        num_microbatches=len(batches),
        seq_length=plan.seq_length,
        micro_batch_size=1 if batches[0].cu_seqlens is not None else plan.config.training.micro_batch_size,
        forward_only=forward_only,
    )
    sums = [float(sum(o[name] for o in outputs)) for name in ("lm loss", "mtp loss", "mtp tokens")]
    result = _reduce(sums, batches, flags())
    result.own_losses = [o["lm loss"] for o in outputs]
    result.own_trained_tokens = sum(int(o["trained tokens"]) for o in outputs)
    if balanced:
        result.auxiliary_losses = auxiliary_loss.take(chunks, num_micro_batches)
    return result


def _all_trained_tokens(batches: list[MicroBatch]) -> int:
    """Trained tokens of the global batch, before anything is computed."""
    from megatron.core import parallel_state

    count = torch.tensor(sum(b.num_trained_tokens for b in batches), device=accelerator.current().current_device())
    dist.all_reduce(count, group=parallel_state.get_data_parallel_group())
    return int(count)


def _reduce(sums: list[float], batches: list[MicroBatch], flags: Mapping[str, float]) -> BatchResult:
    """Sum over all ranks, in the one collective of a step that is not the model's.

    Only the last stage has a loss, of which tensor-parallel ranks hold copies, and every stage and context-parallel
    rank counts the same tokens: so losses come from the first tensor-parallel rank of the last stage, and counts from
    the first context-parallel rank among those. Flags come from everybody.
    """
    from megatron.core import parallel_state

    has_loss = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    has_loss = has_loss and parallel_state.get_tensor_model_parallel_rank() == 0
    counts = [
        sum(b.num_trained_tokens for b in batches),
        sum(b.num_tokens for b in batches),
        sum(attention_pairs(b) for b in batches),
    ]
    counted = has_loss and parallel_state.get_context_parallel_rank() == 0
    own = [*(sums if has_loss else [0.0] * len(sums)), *(counts if counted else [0] * len(counts)), *flags.values()]
    totals = torch.tensor(own, dtype=torch.float64, device=accelerator.current().current_device())
    sum_float64(totals)
    loss, mtp_loss, predicted, trained, tokens, pairs, *told = totals.tolist()
    return BatchResult(
        loss / trained if trained else float("nan"),
        int(trained),
        int(tokens),
        int(pairs),
        mtp_loss / predicted if predicted else None,
        flags=dict(zip(flags, told, strict=True)),
    )


def attention_pairs(batch: MicroBatch) -> int:
    """Query-key pairs of causal attention inside the documents of a micro-batch, without padding."""
    if batch.cu_seqlens is None:
        lengths = (~batch.padding).sum(dim=1)
    else:
        lengths = batch.cu_seqlens.long().clamp(max=batch.num_tokens).diff()
    return int((lengths * (lengths + 1) // 2).sum())
