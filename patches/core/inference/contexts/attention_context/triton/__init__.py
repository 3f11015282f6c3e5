"""Patches of megatron.core.inference.contexts.attention_context.triton."""
