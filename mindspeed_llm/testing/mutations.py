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


def _rotary_not_interleaved() -> AbstractContextManager:
    """Multi-head latent attention turns channels i and i + r/2 together instead of neighbours."""
    from mindspeed_llm.ops.rotary import apply_rotary

    return _patched("mindspeed_llm.models.latent_attention.apply_interleaved_rotary", apply_rotary)


def _no_mscale() -> AbstractContextManager:
    """Attention scores are not multiplied by YaRN's temperature."""
    return _patched("mindspeed_llm.models.attention.softmax_scale", _skip)


@contextmanager
def _prediction_one_off() -> Iterator[None]:
    """Multi-token prediction layers are trained on the label of the position itself."""
    from mindspeed_llm.models.prediction_targets import further_targets

    def not_moved(input_ids, labels, cu_seqlens, count):
        found = further_targets(input_ids, labels, cu_seqlens, count)
        previous = [labels, *(targets for _, targets in found)]
        return [(ids, before) for (ids, _), before in zip(found, previous)]

    with mock.patch("mindspeed_llm.training.step.further_targets", not_moved):
        yield


def _routing_changed(change: Callable) -> AbstractContextManager:
    """`change` of (weights, expert numbers), both [t, k], stands for the weights of the chosen experts."""
    from mindspeed_llm.models.moe.routing import choose_experts

    def changed(logits, shape, score_bias=None):
        weights, experts = choose_experts(logits, shape, score_bias)
        return change(weights, experts), experts

    return _patched("mindspeed_llm.models.moe.router.choose_experts", changed)


def _routing_weights_swapped() -> AbstractContextManager:
    """The experts of a token get each other's weights."""
    return _routing_changed(lambda weights, experts: weights.roll(1, dims=-1))


def _expert_dropped() -> AbstractContextManager:
    """What the first expert computes is lost."""
    return _routing_changed(lambda weights, experts: weights.masked_fill(experts == 0, 0.0))


def _expert_gradients_per_rank() -> AbstractContextManager:
    """Gradients of experts are averaged over ranks, as those of dense layers would be without a sum over tokens."""
    from mindspeed_llm.models.moe.experts import expert_weight

    def scaled(config, *size):
        weight = expert_weight(config, *size)
        weight.register_hook(lambda gradient: gradient / config.expert_model_parallel_size)
        return weight

    return _patched("mindspeed_llm.models.moe.experts.expert_weight", scaled)


def _skip(*arguments, **named) -> None:
    return None


def _no_sum_over_cut_experts() -> AbstractContextManager:
    """The factor of an expert's adapter that is whole on the ranks that share the expert keeps each rank's gradient."""
    return _patched("mindspeed_llm.lora.experts.sum_of_gradients", lambda factor, group: factor)


MUTATIONS: dict[str, Callable[[], AbstractContextManager]] = {
    "no sum over sequence shards": _no_sequence_parallel_sum,
    "no sum over tied embeddings": _no_tied_embedding_sum,
    "no sum over data-parallel ranks": _no_data_parallel_sum,
    "loss mean per rank": _loss_mean_per_rank,
    "rotary not interleaved": _rotary_not_interleaved,
    "scores without mscale": _no_mscale,
    "prediction one off": _prediction_one_off,
    "routing weights swapped": _routing_weights_swapped,
    "an expert dropped": _expert_dropped,
    "expert gradients per rank": _expert_gradients_per_rank,
    "adapters of cut experts not summed": _no_sum_over_cut_experts,
}
