"""Patches of megatron.core."""
