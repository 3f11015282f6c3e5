"""Floating-point operations of training, for throughput and MFU."""

from __future__ import annotations

from mindspeed_llm.models.shape import ModelShape


def matmul_parameters(shape: ModelShape) -> int:
    """Parameters that take part in matrix products per token, without the output layer."""
    h, d = shape.hidden_size, shape.kv_channels
    attention = h * d * (2 * shape.num_attention_heads + 2 * shape.num_query_groups)
    mlp = h * shape.ffn_hidden_size * (3 if shape.gated_linear_unit else 2)
    return shape.num_layers * (attention + mlp)


def training_flops(
    shape: ModelShape, *, tokens: int, attention_pairs: int, output_tokens: int, frozen_base: bool
) -> float:
    """Model FLOPs of forward and backward; recomputation is not counted (MFU, Chowdhery et al. 2022, appendix B).

    Args:
        tokens: real tokens.
        attention_pairs: sum over documents of n (n + 1) / 2, the scores a causal attention needs.
        output_tokens: positions whose logits are needed.
        frozen_base: no weight gradients of the base (LoRA): backward costs one product instead of two.
    """
    passes = 2 if frozen_base else 3
    products = 2.0 * passes * (matmul_parameters(shape) * tokens + shape.vocab_size * shape.hidden_size * output_tokens)
    # Scores and their use are two products of head width; backward recomputes neither but needs twice as many.
    attention = 2.0 * 2.0 * 3 * shape.num_layers * shape.num_attention_heads * shape.kv_channels * attention_pairs
    return products + attention
