"""Patches of megatron.core.fusions."""
