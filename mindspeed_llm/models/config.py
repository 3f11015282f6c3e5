"""The configuration object that megatron-core's modules read: a TransformerConfig and what it has no field for."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron.core.transformer.transformer_config import TransformerConfig

from mindspeed_llm.models.recompute_options import RecomputeOptions
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.parallel.context_split import SequenceSplit


@dataclass
class ModelConfig(TransformerConfig):
    """A TransformerConfig whose biases are told apart and which knows its shape.

    `add_bias_linear` of megatron-core is one switch for all linears; here it stays False and the three below decide
    (`add_qkv_bias` is megatron-core's own).

    Args:
        shape: the architecture the configuration was made from.
        add_attention_output_bias: bias of linear_proj.
        add_mlp_bias: bias of linear_fc1 and linear_fc2.
        padded_vocab_size: rows of the embedding over all tensor-parallel ranks.
        accumulate_weight_gradients: linears add their weights' gradients to `main_grad` inside the product.
        communication_chunks: chunks in which linears overlap what they send with what they multiply under sequence
            parallelism; None for megatron-core's own linears.
        loss_chunk_size: labelled tokens whose logits exist at once in the loss; None chooses by memory.
        ulysses_size: context-parallel ranks that exchange heads; the others form a ring.
        ring_window: ranks of an inner ring of that ring.
        quantized_linears: linears of the layers hold their weights in NF4 (`models.nf4_weight`).
        expert_overlap: what is computed while tokens travel to experts and back (`models.moe.overlap`): "shared" for
            shared experts, "parts" for these and other experts' tokens; "" for nothing.
        recompute: parts of layers computed once more in the backward pass, beside megatron-core's recompute_*.
    """

    shape: ModelShape | None = None
    add_attention_output_bias: bool = False
    add_mlp_bias: bool = False
    padded_vocab_size: int = 0
    loss_chunk_size: int | None = None
    accumulate_weight_gradients: bool = False
    communication_chunks: int | None = None
    ulysses_size: int = 1
    ring_window: int = 1
    quantized_linears: bool = False
    expert_overlap: str = ""
    recompute: RecomputeOptions = field(default_factory=RecomputeOptions)

    def __post_init__(self):
        # megatron-core asks for Transformer Engine's kernels here; ours come in by patches of what would call them.
        fused, self.moe_permute_fusion = self.moe_permute_fusion, False
        super().__post_init__()
        self.moe_permute_fusion = fused

    @property
    def recomputes(self) -> bool:
        """Whether a layer or a part of one is computed once more in the backward pass."""
        return self.recompute_granularity is not None or self.recompute.anything

    @property
    def sequence_split(self) -> SequenceSplit:
        """How context-parallel ranks share a sequence."""
        return SequenceSplit(self.context_parallel_size, self.ulysses_size)

    def window_of_layer(self, layer_number: int) -> int | None:
        """The sliding window of layer `layer_number` (from 1, as megatron counts), None for full attention."""
        layers = self.shape.window_layers
        return self.shape.window_size if layers is None or layer_number - 1 in layers else None
