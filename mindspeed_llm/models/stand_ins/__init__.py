"""What megatron finds under the names of compiled packages that are not installed: their interface over our operators.

Only modules of a Megatron program are answered (accelerator.stand_ins); `import transformer_engine` anywhere else fails
as before. A package that is really installed is not stood in for, unless it computes on another device only.
"""

from __future__ import annotations

_HERE = __name__

# Name a Megatron program imports -> the module that answers.
MODULES = {
    "transformer_engine": f"{_HERE}.transformer_engine",
    "transformer_engine_torch": f"{_HERE}.transformer_engine_torch",
    "grouped_gemm": f"{_HERE}.grouped_gemm",
    "fused_weight_gradient_mlp_cuda": f"{_HERE}.weight_gradient",
    "scaled_softmax_cuda": f"{_HERE}.scaled_softmax",
    "scaled_masked_softmax_cuda": f"{_HERE}.scaled_masked_softmax",
    "scaled_upper_triang_masked_softmax_cuda": f"{_HERE}.scaled_causal_softmax",
    "triton": f"{_HERE}.triton",
}

# Other modules of megatron do without triton when it is absent; these import it whether they need it or not. Of
# Transformer Engine's compiled module only what splits packed rows is there, which these use.
ONLY = {
    "transformer_engine_torch": (
        "megatron.core.models.multimodal.llava_model",
        "megatron.core.ssm.mamba_context_parallel",
        "megatron.core.utils",
    ),
    "triton": (
        "megatron.core.inference.contexts.attention_context.triton.tensor_ops",
        "megatron.core.transformer.custom_layers.batch_invariant_kernels",
    ),
}
