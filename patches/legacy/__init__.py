"""Patches of megatron.legacy, which Megatron-LM's checkout has beside megatron.core."""
