"""Floating-point operations of training, for throughput and MFU."""

from __future__ import annotations

from mindspeed_llm.models.shape import ModelShape


def matmul_parameters(shape: ModelShape) -> int:
    """Parameters that take part in matrix products per token, without the output layer."""
    layers = shape.num_layers + shape.mtp_num_layers
    mlps = sum(_mlp_parameters(shape, shape.is_moe_layer(layer)) for layer in range(layers))
    return layers * _attention_parameters(shape) + mlps + shape.mtp_num_layers * 2 * shape.hidden_size**2


def _attention_parameters(shape: ModelShape) -> int:
    h, d = shape.hidden_size, shape.kv_channels
    if shape.multi_latent_attention:
        norms = shape.kv_lora_rank + (shape.q_lora_rank or 0)
        return shape.attention_parameters() - norms
    return h * d * (2 * shape.num_attention_heads + 2 * shape.num_query_groups)


def _mlp_parameters(shape: ModelShape, has_experts: bool) -> int:
    """Of the experts only those that a token goes to."""
    if has_experts:
        return shape.moe_parameters(experts=shape.moe_router_topk)
    return shape.hidden_size * shape.ffn_hidden_size * (3 if shape.gated_linear_unit else 2)


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
    logits = (1 + shape.mtp_num_layers) * shape.vocab_size * shape.hidden_size * output_tokens
    products = 2.0 * passes * (matmul_parameters(shape) * tokens + logits)
    # Scores and their use are a product of a key's width and one of a value's; backward recomputes neither but needs
    # twice as many.
    layers, widths = shape.num_layers + shape.mtp_num_layers, shape.kv_channels + shape.value_channels
    attention = 2.0 * 3 * layers * shape.num_attention_heads * widths * attention_pairs
    return products + attention
