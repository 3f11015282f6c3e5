"""Patches of megatron.core.inference."""
