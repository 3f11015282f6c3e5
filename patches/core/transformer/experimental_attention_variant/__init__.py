"""Patches of megatron.core.transformer.experimental_attention_variant."""
