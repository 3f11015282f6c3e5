"""Sum of token cross entropies straight from hidden states, without ever holding all logits.

loss = sum over labelled tokens of log(sum_v exp(h w_v)) - h w_label. Logits are computed at labelled tokens only, a
chunk at a time, and each chunk is turned into gradients before the next: memory is one chunk, and the head's product
is not computed twice (fp16 apart). Under tensor parallelism every rank holds a slice of the vocabulary; maxima, sums
and the label's logit are reduced over the ranks. Gradients are those of the sum; backward scales them by what arrives.

Source: the vocabulary-parallel loss of Megatron-LM (arXiv 1909.08053) and the chunking of Liger-Kernel
(arXiv 2410.10989).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

IGNORE_INDEX = -100

# Bytes of fp32 logits held at once. 64 MiB is 512 tokens of a vocabulary of 32000; larger chunks were not faster.
CHUNK_BYTES = 64 * 2**20


def linear_cross_entropy_sum(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """Sum of the cross entropies of the labelled tokens.

    Args:
        hidden: [n, h], the same on every rank of `group`.
        weight: [v_local, h], this rank's contiguous rows of the output layer, padded at the end of the vocabulary.
        labels: integer [n], the target of each row; IGNORE_INDEX leaves the row out.
        vocab_size: true size of the vocabulary; padded rows take no part.
        group: ranks that share the vocabulary, None for one.
        chunk_bytes: bound on the fp32 logits held at once.

    Returns:
        fp32 (fp64 for fp64 input) scalar. The gradient of `hidden` is this rank's part: the caller sums it over `group`
        (Megatron's copy-to or gather-from-sequence-parallel region does).

    Raises:
        ValueError: a label lies outside the vocabulary.
    """
    return _LinearCrossEntropySum.apply(hidden, weight, labels, vocab_size, group, chunk_bytes)


class _LinearCrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, vocab_size, group, chunk_bytes):
        ctx.problem = _Problem(labels, weight.shape[0], vocab_size, group, chunk_bytes)
        # fp16 gradients below 6e-8 would vanish before the loss scale reaches them: there they are computed in
        # backward, from a second product with the head, with the scale applied before rounding.
        ctx.later = hidden.dtype == torch.float16
        needs = (False, False) if ctx.later else ctx.needs_input_grad[:2]
        loss, grad_hidden, grad_weight = ctx.problem.solve(hidden, weight, *needs)
        ctx.save_for_backward(*((hidden, weight) if ctx.later else (grad_hidden, grad_weight)))
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx, grad):
        if ctx.later:
            hidden, weight = ctx.saved_tensors
            _, grad_hidden, grad_weight = ctx.problem.solve(hidden, weight, *ctx.needs_input_grad[:2], factor=grad)
        else:
            grad_hidden, grad_weight = (None if held is None else held * grad for held in ctx.saved_tensors)
        if grad_weight is not None:
            grad_weight = grad_weight.to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None


class _Problem:
    """Which rows are labelled with what, and this rank's slice of the vocabulary."""

    def __init__(
        self, labels: Tensor, rows_local: int, vocab_size: int, group: dist.ProcessGroup | None, chunk_bytes: int
    ):
        self.group = group if group is not None and group.size() > 1 else None
        start = self.group.rank() * rows_local if self.group else 0
        self.own_rows = max(0, min(rows_local, vocab_size - start))
        self.rows = (labels != IGNORE_INDEX).nonzero().squeeze(-1)
        targets = labels[self.rows]
        if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < vocab_size:
            raise ValueError(f"labels must be in [0, {vocab_size}) or {IGNORE_INDEX}")
        self.targets = targets - start
        self.chunk_rows = max(1, chunk_bytes // (4 * -(-vocab_size // (self.group.size() if self.group else 1))))

    def solve(
        self, hidden: Tensor, weight: Tensor, needs_hidden: bool, needs_weight: bool, factor: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Loss, and the gradients asked for, times `factor`."""
        own = weight[: self.own_rows]
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        pieces = list(zip(self.rows.split(self.chunk_rows), self.targets.split(self.chunk_rows)))
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        # One chunk's product has full precision already; sums over chunks are kept wide.
        sum_dtype = weight.dtype if len(pieces) == 1 else wide
        grad_weight = torch.zeros_like(weight, dtype=sum_dtype) if needs_weight else None
        for rows, target in pieces:
            chunk = hidden if rows.numel() == hidden.shape[0] else hidden[rows]
            piece_loss, probabilities = _softmax_loss_((chunk @ own.t()).to(wide), target, self.group)
            loss += piece_loss
            if not (needs_hidden or needs_weight):
                continue
            grad_logits = _minus_one_at_(probabilities, target)
            if factor is not None:
                grad_logits.mul_(factor)
            grad_logits = grad_logits.to(hidden.dtype)
            if needs_hidden:
                grad_hidden.index_copy_(0, rows, grad_logits @ own)
            if needs_weight:
                grad_weight[: self.own_rows] += grad_logits.t() @ chunk
        return loss, grad_hidden, grad_weight


def _softmax_loss_(logits: Tensor, target: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Sum of losses and the softmax of `logits` [c, v_local], which is overwritten; `target` counts from this slice."""
    count, width = logits.shape
    inside = (target >= 0) & (target < width)
    maximum = logits.amax(-1, keepdim=True) if width else logits.new_full((count, 1), float("-inf"))
    if group is not None:
        dist.all_reduce(maximum, dist.ReduceOp.MAX, group=group)
    logits.sub_(maximum)
    at_target = logits.new_zeros(count)
    if width:
        at_target = torch.where(inside, logits.gather(1, target.clamp(0, width - 1)[:, None]).squeeze(1), 0)
    total = logits.exp_().sum(-1)
    if group is not None:
        both = torch.stack((at_target, total))
        dist.all_reduce(both, group=group)
        at_target, total = both.unbind(0)
    return (total.log() - at_target).sum(), logits.mul_(total.reciprocal()[:, None])


def _minus_one_at_(probabilities: Tensor, target: Tensor) -> Tensor:
    """Subtract one at each row's target where it lies in this slice; in place."""
    inside = ((target >= 0) & (target < probabilities.shape[1])).nonzero().squeeze(-1)
    probabilities[inside, target[inside]] -= 1
    return probabilities


def reference(hidden: Tensor, weight: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
    """The formula with all logits, one rank; for tests."""
    logits = hidden @ weight[:vocab_size].t()
    return torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
