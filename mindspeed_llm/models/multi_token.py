"""Multi-token prediction: layers behind the last one that each predict one token further, as in DeepSeek-V3.

    h'_i = layer(W [norm(embedding of token i + k) ; norm(h_i)])        k-th layer; h from the layer before
    loss = sum of cross entropies of norm(h'_i) through the model's output layer, for the token after i + k

Which tokens and labels those are is said in `prediction_targets`.
Source: arXiv 2412.19437, section 2.2; parameter names are those of megatron-core's MultiTokenPredictionLayer.

Legend: s sequence, b batch, h hidden.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from mindspeed_llm.models.config import ModelConfig
from mindspeed_llm.models.linear import ColumnParallelLinear


class MultiTokenPredictionLayer(MegatronModule):
    """One prediction layer: enorm, hnorm, eh_proj, transformer_layer, final_layernorm.

    Args:
        norm: class of the norms.
        layer: specification of the transformer layer inside.
        layer_number: from 1, among the prediction layers.
    """

    def __init__(
        self,
        config: ModelConfig,
        norm: type,
        layer: ModuleSpec,
        layer_number: int,
        vp_stage: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ):
        super().__init__(config=config)
        self.layer_number = layer_number
        hidden_size, epsilon = config.hidden_size, config.layernorm_epsilon
        self.tp_group = ProcessGroupCollection.use_mpu_process_groups(["tp"]).tp
        self.enorm = norm(config, hidden_size, epsilon)
        self.hnorm = norm(config, hidden_size, epsilon)
        self.eh_proj = ColumnParallelLinear(
            2 * hidden_size,
            hidden_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            gather_output=False,
            tp_group=self.tp_group,
        )
        # TransformerLayer adds the stage's offset: prediction layers count on behind the last layer.
        behind = config.num_layers - get_transformer_layer_offset(config, vp_stage)
        self.transformer_layer = build_module(
            layer, config=config, layer_number=behind + layer_number, vp_stage=vp_stage
        )
        self.final_layernorm = norm(config, hidden_size, epsilon)

    def forward(
        self,
        embedded: Tensor,
        hidden_states: Tensor,
        table: Tensor,
        packed_seq_params: PackedSeqParams | None,
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """One prediction further.

        Args:
            embedded: [s, b, h], embeddings of the tokens `layer_number` positions ahead.
            hidden_states: [s, b, h], normalised output of the last layer or of the prediction layer before. Both are a
                rank's share of s under sequence parallelism.
            table: rotary table of the model's own positions; a shift of all positions changes no score.
            packed_seq_params: documents of a packed row.
            padding_mask: [b, s] for the router of a layer with experts, as the layers of the model get it.

        Returns:
            [s, b, h], normalised.
        """

        def run(embedded: Tensor, hidden_states: Tensor) -> Tensor:
            return self._run(embedded, hidden_states, table, packed_seq_params, padding_mask)

        if self.config.recompute_granularity == "full" and self.training:
            return tensor_parallel.checkpoint(run, self.config.distribute_saved_activations, embedded, hidden_states)
        return run(embedded, hidden_states)

    def _run(
        self,
        embedded: Tensor,
        hidden_states: Tensor,
        table: Tensor,
        packed_seq_params: PackedSeqParams | None,
        padding_mask: Tensor | None,
    ) -> Tensor:
        # As in megatron's TransformerBlock: shards of a sequence draw different dropout masks.
        sharded = self.config.sequence_parallel
        with tensor_parallel.get_cuda_rng_tracker().fork() if sharded else nullcontext():
            both = torch.cat((self.enorm(embedded), self.hnorm(hidden_states)), dim=-1)
            joined, _ = self.eh_proj(both)
            joined = tensor_parallel.gather_from_tensor_model_parallel_region(joined, group=self.tp_group)
            if sharded:
                joined = tensor_parallel.scatter_to_sequence_parallel_region(joined, group=self.tp_group)
            out, _ = self.transformer_layer(
                joined,
                attention_mask=None,
                rotary_pos_emb=table,
                packed_seq_params=packed_seq_params,
                padding_mask=padding_mask,
            )
        return self.final_layernorm(out)


def prediction_layers(config: ModelConfig, norm: type, layers: list[ModuleSpec]) -> MultiTokenPredictionBlockSubmodules:
    """The specification of megatron's MultiTokenPredictionBlock, which holds and saves the layers.

    Args:
        layers: specification of the transformer layer in each of them.
    """
    specs = [ModuleSpec(module=MultiTokenPredictionLayer, params={"norm": norm, "layer": layer}) for layer in layers]
    return MultiTokenPredictionBlockSubmodules(layer_specs=specs)
