"""Patches of megatron.core.inference.contexts."""
