"""Patches of megatron.core.transformer.custom_layers."""
