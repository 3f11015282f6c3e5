"""Deliberate mistakes in the library, one at a time: a comparison that does not notice them proves nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from unittest import mock


@contextmanager
def _patched(target: str, replacement: Callable) -> Iterator[None]:
    with mock.patch(target, replacement):
        yield


def _no_sequence_parallel_sum() -> AbstractContextManager:
    """Gradients of what is whole on every tensor-parallel rank are not summed over the sequence shards."""
    return _patched("megatron.core.distributed.finalize_model_grads._allreduce_non_tensor_model_parallel_grads", _skip)


def _no_tied_embedding_sum() -> AbstractContextManager:
    """The two copies of tied embeddings keep the gradients of their own stages."""
    return _patched("megatron.core.distributed.finalize_model_grads._allreduce_word_embedding_grads", _skip)


def _no_data_parallel_sum() -> AbstractContextManager:
    """Every data-parallel rank keeps its own gradients."""
    return _patched(
        "megatron.core.distributed.distributed_data_parallel.DistributedDataParallel.finish_grad_sync", _skip
    )


@contextmanager
def _loss_mean_per_rank() -> Iterator[None]:
    """Each rank divides by its own trained tokens instead of the global number."""
    from mindspeed_llm.training import step

    original = step.forward_step

    def forward_step(batches, model):
        output, loss_function = original(batches, model)

        def mean(loss_sum):
            loss, trained, logged = loss_function(loss_sum)
            return loss / trained.clamp_min(1), trained, logged

        return output, mean

    with mock.patch.object(step, "forward_step", forward_step):
        yield


def _skip(*arguments, **named) -> None:
    return None


MUTATIONS: dict[str, Callable[[], AbstractContextManager]] = {
    "no sum over sequence shards": _no_sequence_parallel_sum,
    "no sum over tied embeddings": _no_tied_embedding_sum,
    "no sum over data-parallel ranks": _no_data_parallel_sum,
    "loss mean per rank": _loss_mean_per_rank,
}
