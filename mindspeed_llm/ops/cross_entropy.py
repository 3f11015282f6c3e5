"""Sum of token cross entropies straight from hidden states, without ever holding all logits; and from logits at hand.

loss = sum over labelled tokens of log(sum_v exp(h w_v)) - h w_label. Logits are computed at labelled tokens only, a
chunk at a time, and each chunk is turned into gradients before the next: memory is one chunk, and the head's product
is not computed twice (fp16 apart). Under tensor parallelism every rank holds a slice of the vocabulary; maxima, sums
and the label's logit are reduced over the ranks. Gradients are those of the sum; backward scales them by what arrives.

Source: the vocabulary-parallel loss of Megatron-LM (arXiv 1909.08053) and the chunking of Liger-Kernel
(arXiv 2410.10989).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_llm.ops.registry import REFERENCE, implementation, register

IGNORE_INDEX = -100

# Bytes of logits held at once, in the activations' dtype: 2048 tokens of a vocabulary of 32000 in bf16. A head of one
# chunk adds up no weight gradients, and larger products are faster.
CHUNK_BYTES = 128 * 2**20

# Rows are widened to fp32 in blocks of about this many bytes, which a CPU core's cache holds; on other devices, whose
# cost is the launch, all rows of a chunk at once.
CPU_BLOCK_BYTES = 2 * 2**20


def linear_cross_entropy_sum(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """Sum of the cross entropies of the labelled tokens.

    Args:
        hidden: [n, h], the same on every rank of `group`.
        weight: [v_local, h], this rank's contiguous rows of the output layer, padded at the end of the vocabulary.
        labels: integer [n], the target of each row; IGNORE_INDEX leaves the row out.
        vocab_size: true size of the vocabulary; padded rows take no part.
        group: ranks that share the vocabulary, None for one.
        chunk_rows: labelled rows whose logits are held at once; None for as many as CHUNK_BYTES hold.

    Returns:
        fp32 (fp64 for fp64 input) scalar. The gradient of `hidden` is this rank's part: the caller sums it over `group`
        (Megatron's copy-to or gather-from-sequence-parallel region does).

    Raises:
        ValueError: a label lies outside the vocabulary.
    """
    return implementation("linear_cross_entropy_sum")(hidden, weight, labels, vocab_size, group, chunk_rows)


def vocab_parallel_cross_entropy(logits: Tensor, targets: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Cross entropy of every row of logits.

    Args:
        logits: [..., v_local], this rank's contiguous slice of the vocabulary, all slices of one width.
        targets: integer [...], the same on every rank; rows of IGNORE_INDEX have loss and gradient zero.
        group: ranks that share the vocabulary, None for one.

    Returns:
        fp32 (fp64 for fp64 logits) [...]. The gradient of the logits is rounded to their dtype once.

    Raises:
        ValueError: a target outside the vocabulary.
    """
    flat = targets.reshape(-1)
    size = logits.shape[-1] * (1 if group is None else group.size())
    _check_labels(flat[flat != IGNORE_INDEX], size)
    function = implementation("vocab_parallel_cross_entropy")
    return function(logits.reshape(-1, logits.shape[-1]), flat, group).view(targets.shape)


def _check_labels(labels: Tensor, vocab_size: int) -> None:
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < vocab_size:
        raise ValueError(f"labels must be in [0, {vocab_size}) or {IGNORE_INDEX}")


@register("linear_cross_entropy_sum", "chunked")
def chunked_linear_cross_entropy_sum(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """Logits of one chunk at a time, turned into gradients in place."""
    return _LinearCrossEntropySum.apply(hidden, weight, labels, vocab_size, group, chunk_rows)


class _LinearCrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, vocab_size, group, chunk_rows):
        ctx.problem = _Problem(labels, weight, vocab_size, group, chunk_rows)
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
        self, labels: Tensor, weight: Tensor, vocab_size: int, group: dist.ProcessGroup | None, chunk_rows: int | None
    ):
        self.group = group if group is not None and group.size() > 1 else None
        start = self.group.rank() * weight.shape[0] if self.group else 0
        self.own_rows = max(0, min(weight.shape[0], vocab_size - start))
        self.rows = (labels != IGNORE_INDEX).nonzero().squeeze(-1)
        targets = labels[self.rows]
        _check_labels(targets, vocab_size)
        self.targets = targets - start
        # By the rows of a full slice: chunks must be cut alike on every rank, whatever padding it holds.
        self.chunk_rows = chunk_rows or max(1, CHUNK_BYTES // (weight.element_size() * weight.shape[0]))

    def solve(
        self, hidden: Tensor, weight: Tensor, needs_hidden: bool, needs_weight: bool, factor: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Loss, and the gradients asked for, times `factor`."""
        own = weight[: self.own_rows]
        pieces = list(zip(self.rows.split(self.chunk_rows), self.targets.split(self.chunk_rows)))
        buffer = hidden.new_empty(min(self.chunk_rows, self.rows.numel()), self.own_rows)
        loss = torch.zeros((), dtype=_wide(hidden.dtype), device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        # One chunk's product has full precision already; sums over chunks are kept wide.
        sum_dtype = weight.dtype if len(pieces) <= 1 else _wide(weight.dtype)
        grad_weight = torch.zeros_like(weight, dtype=sum_dtype) if needs_weight else None
        for rows, target in pieces:
            chunk = hidden if rows.numel() == hidden.shape[0] else hidden[rows]
            logits = torch.mm(chunk, own.t(), out=buffer[: rows.numel()])
            loss += self._loss(logits, target, needs_hidden or needs_weight, factor)
            if needs_hidden:
                grad_hidden.index_copy_(0, rows, logits @ own)
            if needs_weight:
                grad_weight[: self.own_rows] += logits.t() @ chunk
        return loss, grad_hidden, grad_weight

    def _loss(self, logits: Tensor, target: Tensor, needs_gradient: bool, factor: Tensor | None) -> Tensor:
        """Sum of the losses of this rank's logits [c, v_local], which become gradients where those are needed."""
        if self.group is None:
            return _softmax_loss_(logits, target, needs_gradient, factor)
        log_sum, loss = self._log_sum_and_loss(logits, target)
        if needs_gradient:
            _to_gradient_(logits, log_sum, target, factor)
        return loss

    def _log_sum_and_loss(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """log(sum exp) over all ranks' slices of the vocabulary, [c, 1], and the sum of the losses."""
        wide = _wide(logits.dtype)
        inside = (target >= 0) & (target < logits.shape[1])
        at_target = torch.zeros(target.shape, dtype=wide, device=logits.device)
        at_target[inside] = logits[inside, target[inside]].to(wide)
        log_sum = torch.full((logits.shape[0], 1), float("-inf"), dtype=wide, device=logits.device)
        if logits.shape[1]:
            for block in _row_blocks(logits):
                torch.logsumexp(logits[block].to(wide), dim=-1, keepdim=True, out=log_sum[block])
        maximum = log_sum.clone()
        dist.all_reduce(maximum, dist.ReduceOp.MAX, group=self.group)
        parts = torch.stack(((log_sum - maximum).exp().squeeze(-1), at_target))
        dist.all_reduce(parts, group=self.group)
        log_sum, at_target = parts[0].log()[:, None] + maximum, parts[1]
        return log_sum, (log_sum.squeeze(-1) - at_target).sum()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _row_blocks(logits: Tensor) -> Iterator[slice]:
    rows, width = logits.shape
    step = max(1, rows)
    if logits.device.type == "cpu":
        step = max(1, CPU_BLOCK_BYTES // (4 * width))
    return (slice(start, start + step) for start in range(0, rows, step))


def _softmax_loss_(logits: Tensor, target: Tensor, needs_gradient: bool, factor: Tensor | None) -> Tensor:
    """Sum of the losses of one rank that holds the whole vocabulary, the gradient replacing the logits.

    With nothing to wait for between maximum, sum and gradient, each block of rows is widened and exponentiated once.
    """
    losses = logits.new_empty(logits.shape[0], dtype=_wide(logits.dtype))
    for block in _row_blocks(logits):
        wide, own = logits[block].to(losses.dtype, copy=True), target[block, None]
        shifted = wide.sub_(wide.amax(-1, keepdim=True))
        at_target = shifted.gather(1, own)
        total = shifted.exp_().sum(-1, keepdim=True)
        losses[block] = (total.log() - at_target).squeeze(-1)
        if needs_gradient:
            one = torch.ones_like(total) if factor is None else factor.expand_as(total)
            wide.mul_(one / total).scatter_add_(1, own, -one)
            logits[block] = wide
    return losses.sum()


def _to_gradient_(logits: Tensor, log_sum: Tensor, target: Tensor, factor: Tensor | None) -> None:
    """Turn logits into (softmax - one at the target) * factor, in place; rounded once, from fp32."""
    width = logits.shape[1]
    if width == 0:
        return
    for block in _row_blocks(logits):
        gradient = logits[block].to(log_sum.dtype).sub_(log_sum[block]).exp_()
        inside = ((target[block] >= 0) & (target[block] < width)).nonzero().squeeze(-1)
        gradient[inside, target[block][inside]] -= 1
        if factor is not None:
            gradient *= factor
        logits[block] = gradient


@register("vocab_parallel_cross_entropy", "torch")
def torch_vocab_parallel_cross_entropy(logits: Tensor, targets: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Saves the probabilities in the logits' dtype and nothing else; two collectives of a few numbers a row."""
    return _VocabParallelCrossEntropy.apply(logits, targets, group)


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        several = group is not None and group.size() > 1
        width = logits.shape[1]
        wide = logits.to(_wide(logits.dtype), copy=True)
        kept = targets != IGNORE_INDEX
        own = targets - (group.rank() * width if several else 0)
        inside = ((own >= 0) & (own < width) & kept).nonzero().squeeze(-1)
        maximum = wide.amax(-1, keepdim=True)
        if several:
            dist.all_reduce(maximum, dist.ReduceOp.MAX, group=group)
        wide.sub_(maximum)
        at_target = wide.new_zeros(wide.shape[0])
        at_target[inside] = wide[inside, own[inside]]
        total = wide.exp_().sum(-1)
        if several:
            sums = torch.stack((total, at_target))
            dist.all_reduce(sums, group=group)
            total, at_target = sums.unbind(0)
        ctx.save_for_backward(wide.div_(total[:, None]).to(logits.dtype), inside, own[inside], kept)
        return (total.log() - at_target).masked_fill_(~kept, 0.0)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        probabilities, rows, columns, kept = ctx.saved_tensors
        gradient = probabilities.to(grad.dtype, copy=True)
        gradient[rows, columns] -= 1
        return gradient.mul_((grad * kept)[:, None]).to(probabilities.dtype), None, None


@register("vocab_parallel_cross_entropy", REFERENCE, priority=-1)
def vocab_parallel_reference(logits: Tensor, targets: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The formula over the logits of all ranks, differentiated by autograd."""
    logits = _gathered(logits, group)
    return torch.nn.functional.cross_entropy(
        logits.to(_wide(logits.dtype)), targets, ignore_index=IGNORE_INDEX, reduction="none"
    )


class _Gather(torch.autograd.Function):
    """[n, v_local] -> [n, v]; every rank computes the same loss, so its own slice of the gradient is the whole one."""

    @staticmethod
    def forward(ctx, logits: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        slices = [torch.empty_like(logits) for _ in range(group.size())]
        dist.all_gather(slices, logits.contiguous(), group=group)
        return torch.cat(slices, dim=1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad.chunk(ctx.group.size(), dim=1)[ctx.group.rank()].contiguous(), None


def _gathered(logits: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    return logits if group is None or group.size() == 1 else _Gather.apply(logits, group)


@register("linear_cross_entropy_sum", REFERENCE, priority=-1)
def reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """The formula with all logits at once, whatever chunk_rows says, differentiated by autograd."""
    _check_labels(labels[labels != IGNORE_INDEX], vocab_size)
    logits = _gathered(hidden @ weight.t(), group)[:, :vocab_size]
    return torch.nn.functional.cross_entropy(
        logits.to(_wide(logits.dtype)), labels, ignore_index=IGNORE_INDEX, reduction="sum"
    )
