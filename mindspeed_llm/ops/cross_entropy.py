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
from mindspeed_llm.ops.row_blocks import row_blocks, scratch

IGNORE_INDEX = -100

# Bytes of logits held at once, in the activations' dtype: 2048 tokens of a vocabulary of 32000 in bf16. A head of one
# chunk adds up no weight gradients, and larger products are faster.
CHUNK_BYTES = 128 * 2**20
# On a CPU, with a frozen head: logits that the last cache still holds when they are read again, but no products of
# fewer rows, which are slower. Figures stand in docs/benchmarks.md.
CACHED_BYTES, ENOUGH_ROWS = 32 * 2**20, 512

# Below it a probability in fp32 has too few digits for its logarithm.
SMALLEST_PROBABILITY = 1e-35


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
        chunk_rows: labelled rows whose logits are held at once; None for `rows_of_chunk`.

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


def rows_of_chunk(row_bytes: int, frozen: bool, device_type: str) -> int:
    """Rows of a chunk where nothing else is asked for.

    Args:
        row_bytes: of a row of this rank's logits.
        frozen: the head has no gradient, so more chunks are no more sums.
    """
    rows = max(1, CHUNK_BYTES // row_bytes)
    return min(rows, max(ENOUGH_ROWS, CACHED_BYTES // row_bytes)) if frozen and device_type == "cpu" else rows


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
    if not torch.is_grad_enabled():
        # torch tells a function that its inputs need gradients even where none are being recorded.
        hidden, weight = hidden.detach(), weight.detach()
    return _LinearCrossEntropySum.apply(hidden, weight, labels, vocab_size, group, chunk_rows)


class _LinearCrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, vocab_size, group, chunk_rows):
        ctx.problem = _Problem(labels, weight, vocab_size, group, chunk_rows, frozen=not ctx.needs_input_grad[1])
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
            grad_hidden, grad_weight = (None if held is None else _times(held, grad) for held in ctx.saved_tensors)
        if grad_weight is not None:
            grad_weight = grad_weight.to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None


def _times(held: Tensor, factor: Tensor) -> Tensor:
    """held * factor, which is `held` itself where the factor is seen to be 1 without waiting for a device."""
    if factor.device.type == "cpu" and float(factor) == 1.0:
        return held
    return held * factor


class _Problem:
    """Which rows are labelled with what, and this rank's slice of the vocabulary."""

    def __init__(
        self,
        labels: Tensor,
        weight: Tensor,
        vocab_size: int,
        group: dist.ProcessGroup | None,
        chunk_rows: int | None,
        frozen: bool,
    ):
        self.group = group if group is not None and group.size() > 1 else None
        start = self.group.rank() * weight.shape[0] if self.group else 0
        self.own_rows = max(0, min(weight.shape[0], vocab_size - start))
        self.rows = (labels != IGNORE_INDEX).nonzero().squeeze(-1)
        targets = labels[self.rows]
        _check_labels(targets, vocab_size)
        self.targets = targets - start
        # By the rows of a full slice: chunks must be cut alike on every rank, whatever padding it holds.
        row_bytes = weight.element_size() * weight.shape[0]
        self.chunk_rows = chunk_rows or rows_of_chunk(row_bytes, frozen, weight.device.type)

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
        grad_weight = torch.empty_like(weight, dtype=sum_dtype) if needs_weight else None
        if needs_weight:
            grad_weight[self.own_rows if pieces else 0 :].zero_()
        for number, (rows, target) in enumerate(pieces):
            chunk = hidden if rows.numel() == hidden.shape[0] else hidden[rows]
            logits = torch.mm(chunk, own.t(), out=buffer[: rows.numel()])
            loss += self._loss(logits, target, needs_hidden or needs_weight, factor)
            if needs_hidden:
                grad_hidden.index_copy_(0, rows, logits @ own)
            if needs_weight:
                _add_product(grad_weight[: self.own_rows], logits.t(), chunk, beginning=number == 0)
        return loss, grad_hidden, grad_weight

    def _loss(self, logits: Tensor, target: Tensor, needs_gradient: bool, factor: Tensor | None) -> Tensor:
        """Sum of the losses of this rank's logits [c, v_local], which become gradients where those are needed."""
        if self.group is None:
            return _softmax_loss_(logits, target, needs_gradient, factor)
        inside = ((target >= 0) & (target < logits.shape[1])).nonzero().squeeze(-1)
        log_sum, at_target = _shared_log_sum(logits, inside, target[inside], self.group)
        if needs_gradient:
            _to_gradient_(logits, log_sum, target, factor)
        return (log_sum.squeeze(-1) - at_target).sum()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _add_product(total: Tensor, a: Tensor, b: Tensor, beginning: bool) -> None:
    """total + a b, or a b at the beginning, into `total`; without a tensor beside it where the types agree."""
    if total.dtype != a.dtype:
        total.copy_(a @ b) if beginning else total.add_(a @ b)
    elif beginning:
        torch.mm(a, b, out=total)
    else:
        total.addmm_(a, b)


def _shared_log_sum(logits: Tensor, rows: Tensor, columns: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """log(sum exp) over all ranks' slices of the vocabulary, [c, 1], and the logits of the targets, [c].

    Args:
        logits: this rank's [c, v_local]; the targets that it has stand at (rows, columns).
    """
    wide = _wide(logits.dtype)
    at_target = torch.zeros(logits.shape[0], dtype=wide, device=logits.device)
    at_target[rows] = logits[rows, columns].to(wide)
    log_sum = torch.full((logits.shape[0], 1), float("-inf"), dtype=wide, device=logits.device)
    if logits.shape[1]:
        for block in row_blocks(*logits.shape, logits, wide):
            torch.logsumexp(logits[block].to(wide), dim=-1, keepdim=True, out=log_sum[block])
    maximum = log_sum.clone()
    dist.all_reduce(maximum, dist.ReduceOp.MAX, group=group)
    parts = torch.stack(((log_sum - maximum).exp().squeeze(-1), at_target))
    dist.all_reduce(parts, group=group)
    return parts[0].log()[:, None] + maximum, parts[1]


def _softmax_blocks(
    logits: Tensor, target: Tensor, into: Tensor | None = None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Of some rows after others of logits [c, v]: which, their probabilities, wide, and their losses [rows].

    Targets [c] must be in the vocabulary. Probabilities are written to their rows of `into`, of the wide type; without
    it the next block takes the memory of the one before.
    """
    wide = _wide(logits.dtype)
    blocks = list(row_blocks(*logits.shape, logits, wide))
    widened = scratch(blocks, logits.shape[1], logits, wide) if into is None else None
    for block in blocks:
        own = logits[block]
        probabilities = widened[: own.shape[0]] if into is None else into[block]
        torch.softmax(own if own.dtype == wide else probabilities.copy_(own), dim=-1, out=probabilities)
        at_target = probabilities.gather(1, target[block, None]).squeeze(1)
        # Looking at the smallest would wait for a device, which takes the exact way.
        on_device = logits.device.type != "cpu"
        if on_device or (at_target.numel() and float(at_target.min()) < SMALLEST_PROBABILITY):
            losses = own.to(wide).logsumexp(-1) - own.gather(1, target[block, None]).squeeze(1)
        else:
            losses = at_target.log().neg_()
        yield block, probabilities, losses


def _softmax_loss_(logits: Tensor, target: Tensor, needs_gradient: bool, factor: Tensor | None) -> Tensor:
    """Sum of the losses of one rank that holds the whole vocabulary, the gradient replacing the logits."""
    losses = logits.new_empty(logits.shape[0], dtype=_wide(logits.dtype))
    one = torch.ones((), dtype=losses.dtype, device=losses.device) if factor is None else factor
    for block, gradient, own_losses in _softmax_blocks(logits, target):
        losses[block] = own_losses
        if needs_gradient:
            if factor is not None:
                gradient.mul_(factor)
            logits[block] = gradient.scatter_add_(1, target[block, None], -one.expand(gradient.shape[0], 1))
    return losses.sum()


def _to_gradient_(logits: Tensor, log_sum: Tensor, target: Tensor, factor: Tensor | None) -> None:
    """Turn logits into (softmax - one at the target) * factor, in place; rounded once, from fp32."""
    width = logits.shape[1]
    if width == 0:
        return
    for block in row_blocks(*logits.shape, logits, log_sum.dtype):
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
        kept = targets != IGNORE_INDEX
        own = targets - (group.rank() * width if several else 0)
        inside = ((own >= 0) & (own < width) & kept).nonzero().squeeze(-1)
        columns = own[inside]
        probabilities = torch.empty_like(logits)
        if several:
            log_sum, at_target = _shared_log_sum(logits, inside, columns, group)
            losses = log_sum.squeeze(-1) - at_target
            for block in row_blocks(*logits.shape, logits, log_sum.dtype):
                probabilities[block] = logits[block].to(log_sum.dtype).sub_(log_sum[block]).exp_()
        else:
            losses = logits.new_empty(logits.shape[0], dtype=_wide(logits.dtype))
            into = probabilities if logits.dtype == losses.dtype else None
            for block, exact, own_losses in _softmax_blocks(logits, own.where(kept, 0), into):
                losses[block] = own_losses
                if into is None:
                    probabilities[block] = exact
        ctx.save_for_backward(probabilities, inside, columns, kept)
        return losses.masked_fill_(~kept, 0.0)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        probabilities, rows, columns, kept = ctx.saved_tensors
        factor = (grad * kept)[:, None]
        gradient = torch.empty_like(probabilities)
        blocks = list(row_blocks(*gradient.shape, gradient, grad.dtype))
        narrow = gradient.dtype != grad.dtype
        widened = scratch(blocks, gradient.shape[1], gradient, grad.dtype) if narrow else None
        for block in blocks:
            if narrow:
                own = widened[: block.stop - block.start].copy_(probabilities[block])
                gradient[block] = own.mul_(factor[block])
            else:
                torch.mul(probabilities[block], factor[block], out=gradient[block])
        at_target = (probabilities[rows, columns].to(grad.dtype) - 1) * factor[rows, 0]
        gradient[rows, columns] = at_target.to(gradient.dtype)
        return gradient, None, None


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
