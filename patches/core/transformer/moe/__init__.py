"""Patches of megatron.core.transformer.moe."""
