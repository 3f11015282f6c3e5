"""Transformer Engine's Python interface, as far as megatron-core uses it, over our operators.

megatron's own TELinear, TENorm, TEDotProductAttention ... derive from these classes, so that
`get_gpt_layer_with_transformer_engine_spec`, `--transformer-impl transformer_engine` and checkpoints of such models
work without CUDA. 8- and 4-bit floats, user buffers and CUDA graphs are refused.
"""

from mindspeed_llm.models.stand_ins.transformer_engine import common, pytorch

__all__ = ["common", "pytorch"]

# The interface is this release's. Later ones promise megatron more: learnable softmax offsets (2.8), the largest score
# of each head (2.9), graphs that are captured again (2.10).
__version__ = "2.7.0"
