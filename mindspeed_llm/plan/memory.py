"""Bytes per device, estimated from the shape and the layout before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass

from mindspeed_llm.models.shape import ModelShape


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the fullest device. Activations are an estimate for the layers' saved tensors and the loss chunk."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All four together."""
        return self.weights + self.gradients + self.optimizer + self.activations


def parameters_per_device(shape: ModelShape, *, tp: int, pp: int, padded_vocab: int) -> int:
    """Parameters of the fullest pipeline stage (the first: it holds the embedding) on one tensor-parallel rank."""
    vocabulary = padded_vocab * shape.hidden_size
    both_ends = pp == 1 and not shape.tie_word_embeddings
    body = shape.num_parameters() - shape.vocab_size * shape.hidden_size * (1 if shape.tie_word_embeddings else 2)
    return body // (tp * pp) + vocabulary * (2 if both_ends else 1) // tp


def estimate(
    shape: ModelShape,
    *,
    tp: int,
    pp: int,
    dp: int,
    padded_vocab: int,
    dtype_bytes: int,
    trainable_share: float,
    tokens_per_microbatch: int,
    micro_batches: int,
    sequence_parallel: bool,
    distributed_optimizer: bool,
    recompute: str | None,
    loss_chunk: int,
) -> MemoryEstimate:
    """The estimate for one training process.

    Args:
        dtype_bytes: of weights and activations (2 for bf16/fp16, 4 for fp32).
        trainable_share: trained parameters / all parameters.
        tokens_per_microbatch: micro-batch size x sequence length.
        recompute: None, "selective" or "full".
    """
    parameters = parameters_per_device(shape, tp=tp, pp=pp, padded_vocab=padded_vocab)
    trained = int(parameters * trainable_share)
    per_parameter = 8 + (4 if dtype_bytes == 2 else 0)
    optimizer = trained * per_parameter // (dp if distributed_optimizer else 1)
    in_flight = min(pp, micro_batches)
    layer = activation_bytes_per_token(shape, tp=tp, sequence_parallel=sequence_parallel, dtype_bytes=dtype_bytes)
    layers = shape.num_layers // pp
    if recompute == "full":
        held = layers * shape.hidden_size * dtype_bytes // (tp if sequence_parallel else 1) + layer
    else:
        held = layers * layer
    logits = min(loss_chunk, tokens_per_microbatch) * (padded_vocab // tp) * 4 * 2
    # Embedding output, final norm, and what the loss computes in advance: the gradient of its input and of the head.
    ends = 4 * shape.hidden_size * dtype_bytes // (tp if sequence_parallel else 1)
    head_gradient = padded_vocab * shape.hidden_size * 4 // tp if trainable_share == 1.0 else 0
    return MemoryEstimate(
        weights=parameters * dtype_bytes,
        gradients=trained * 4,
        optimizer=optimizer,
        activations=(held * in_flight + ends) * tokens_per_microbatch + logits + head_gradient,
    )


def activation_bytes_per_token(shape: ModelShape, *, tp: int, sequence_parallel: bool, dtype_bytes: int) -> int:
    """Saved tensors of one layer per token: norm inputs and outputs, q, k, v, attention output, fc1 and SwiGLU outputs.

    The counting of Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (2022),
    section 4, for a gated MLP, an attention without stored scores and no dropout masks.
    """
    h, d = shape.hidden_size, shape.kv_channels
    along_sequence = 4 * h // (tp if sequence_parallel else 1)
    attention = (shape.num_attention_heads * 2 + shape.num_query_groups * 2) * d // tp
    mlp = shape.ffn_hidden_size * (3 if shape.gated_linear_unit else 2) // tp
    return (along_sequence + attention + mlp) * dtype_bytes
