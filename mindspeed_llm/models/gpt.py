"""A decoder-only language model on megatron-core's GPTModel, with a loss that never holds all logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import (
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import Tensor

from mindspeed_llm.accelerator.ranges import in_range
from mindspeed_llm.models.attention import KeyValueCache, SelfAttention
from mindspeed_llm.models.config import ModelConfig
from mindspeed_llm.models.latent_attention import LatentAttention
from mindspeed_llm.models.layer import DecoderLayer
from mindspeed_llm.models.mlp import MLP
from mindspeed_llm.models.moe.layer import forget_micro_batches, moe_specification
from mindspeed_llm.models.multi_token import prediction_layers
from mindspeed_llm.models.norm import LayerNorm, RMSNorm
from mindspeed_llm.models.prediction_targets import further_targets
from mindspeed_llm.models.recompute import count_over_rank, pass_padding_mask
from mindspeed_llm.models.rope import LENGTH_DEPENDENT, rope_frequencies
from mindspeed_llm.ops.cross_entropy import linear_cross_entropy_sum
from mindspeed_llm.ops.rotary import rotary_table


def norm_class(config: ModelConfig) -> type:
    """The kind of norm around attention and MLP."""
    return RMSNorm if config.shape.normalization == "RMSNorm" else LayerNorm


def layer_specification(config: ModelConfig, layer: int) -> ModuleSpec:
    """The modules of one layer, by its index from 0 in the whole model."""
    norm = norm_class(config)
    attention = LatentAttention if config.shape.multi_latent_attention else SelfAttention
    return ModuleSpec(
        module=DecoderLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(module=attention),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=moe_specification(config) if config.shape.is_moe_layer(layer) else MLP,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def stage_specification(config: ModelConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The modules of this stage's layers, for megatron's TransformerBlock."""
    first = get_transformer_layer_offset(config, vp_stage)
    layers = range(first, first + get_num_layers_to_build(config, vp_stage))
    return TransformerBlockSubmodules(
        layer_specs=[layer_specification(config, layer) for layer in layers], layer_norm=norm_class(config)
    )


def prediction_specification(config: ModelConfig) -> MultiTokenPredictionBlockSubmodules | None:
    """The multi-token prediction layers, which the last stage holds; None for a model without."""
    shape = config.shape
    layers = range(shape.num_layers, shape.num_layers + shape.mtp_num_layers)
    if not layers:
        return None
    return prediction_layers(config, norm_class(config), [layer_specification(config, layer) for layer in layers])


class LanguageModel(GPTModel):
    """GPTModel whose forward takes labels to a loss sum, positions to a rotary table, and a cache for generation.

    Parameter names are those of megatron-core's local specification.
    """

    def __init__(self, config: ModelConfig, *, pre_process: bool, post_process: bool, vp_stage: int | None = None):
        shape = config.shape
        super().__init__(
            config=config,
            transformer_layer_spec=stage_specification(config, vp_stage),
            vocab_size=config.padded_vocab_size,
            max_sequence_length=shape.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=shape.tie_word_embeddings,
            position_embedding_type="none",
            mtp_block_spec=prediction_specification(config) if post_process else None,
            vp_stage=vp_stage,
        )
        count_over_rank(self.decoder, config, vp_stage)
        pass_padding_mask(self.decoder)
        forget_micro_batches(self)
        if self.mtp_process and shape.tie_word_embeddings:
            # The embedding that the prediction layers need here is the output layer's weight too.
            self.output_layer.weight = None
        self._frequencies: tuple[Tensor, float] | None = None

    def forward(
        self,
        input_ids: Tensor | None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        inference_context: KeyValueCache | None = None,
        last_position_only: bool = False,
        gather_logits: bool | None = None,
        further: Sequence[tuple[Tensor, Tensor]] | None = None,
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """One stage's forward pass.

        Args:
            input_ids: [b, s] (packed: [1, t]); read by the first stage.
            position_ids: [b, s] or [1, s]; None counts from 0, in each document when packed. Under context parallelism
                a rank gets the tokens, labels and positions of its `context_split.SequenceSplit.ranges`.
            attention_mask: bool [b or 1, 1, s, s] over whole sequences, True where a position does not see another; it
                takes the place of causal order. None for causal attention, where right padding needs no mask.
            labels: [b, s], labels[i] being the target at position i; -100 is ignored.
            packed_seq_params: documents of a packed row, qkv_format 'thd', cu_seqlens_q ending at t.
            inference_context: a KeyValueCache (models.attention); the queries are the newest positions.
            last_position_only: logits of the last position alone, [b, 1, v].
            gather_logits: collect the logits of all tensor-parallel ranks; default: when a cache is given.
            further: with multi-token prediction (token ids, labels) of each prediction layer, as
                `prediction_targets.further_targets` makes them of whole rows; None makes them here, where rows are
                whole.
            padding_mask: bool [b, s], True for tokens that routers of experts leave out of counts and auxiliary losses;
                given on all ranks or none.

        Returns:
            Before the last stage: hidden states [s, b, h]. Last stage with labels: the SUM of the labelled tokens'
            losses, a scalar (fp32); with multi-token prediction [1 + prediction layers] sums, the model's own first, of
            which `prediction_targets.objective` is what is minimised. Without labels: logits [b, s, v] of the true
            vocabulary when gathered, else [b, s, v_local] with -inf in the padded columns.

        Raises:
            ValueError: a mask where other things decide what is seen, ids outside the vocabulary, or shapes that do not
                fit together.
        """
        if attention_mask is not None and self.config.shape.mtp_num_layers:
            raise ValueError("attention_mask must be None: multi-token prediction layers are causal")
        if packed_seq_params is not None and packed_seq_params.qkv_format != "thd":
            raise ValueError(f"packed_seq_params.qkv_format must be 'thd', not {packed_seq_params.qkv_format!r}")
        if inference_context is not None:
            self._check_cache_is_used(packed_seq_params)
        decoder_input = self._embed(input_ids) if self.pre_process else None
        table = self._rotary_table(input_ids, position_ids, packed_seq_params)
        if padding_mask is not None and self.config.sequence_parallel:
            padding_mask = padding_mask.chunk(self.tp_group.size(), dim=1)[self.tp_group.rank()]
        hidden_states = self.decoder(
            hidden_states=decoder_input,
            attention_mask=attention_mask,
            inference_context=inference_context,
            rotary_pos_emb=table,
            packed_seq_params=packed_seq_params,
            padding_mask=padding_mask,
        )
        if not self.post_process:
            return hidden_states
        if labels is not None and self.mtp_process:
            if further is None:
                further = self._further_targets(input_ids, labels, packed_seq_params)
            return self._losses(hidden_states, labels, further, table, packed_seq_params, padding_mask)
        if labels is not None:
            return self._loss_sum(hidden_states, labels)
        gather = inference_context is not None if gather_logits is None else gather_logits
        return self._logits(hidden_states, last_position_only, gather)

    def output_weight(self) -> Tensor:
        """The output layer's weight [v_local, h], the embedding's when they are tied."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def _embed(self, input_ids: Tensor) -> Tensor:
        tp = self.tp_group.size()
        if self.config.sequence_parallel and input_ids.shape[1] % tp:
            raise ValueError(f"sequence parallelism needs a multiple of {tp} tokens per row, not {input_ids.shape[1]}")
        # Megatron's parallel embedding turns an id outside every rank's slice into a zero vector without a word.
        inside = ((input_ids >= 0) & (input_ids < self.config.shape.vocab_size)).all()
        if input_ids.device.type != "cpu":
            torch._assert_async(inside, "input_ids outside the vocabulary")
        elif not inside:
            raise ValueError(f"input_ids must be in [0, {self.config.shape.vocab_size})")
        hidden_states = self.embedding(input_ids=input_ids, position_ids=None)
        # Megatron's transposition leaves the strides of [b, s, h]. With a batch of one that passes for contiguous, but
        # torch.matmul then takes each token for a product of its own and copies the weight for it.
        hidden_states = hidden_states.flatten(0, 1).unflatten(0, hidden_states.shape[:2])
        # Recomputation replays a layer only for inputs that need a gradient; with a frozen embedding (LoRA) the first
        # layers would silently not be trained.
        recomputes = self.config.recomputes and self.training and torch.is_grad_enabled()
        if recomputes and not hidden_states.requires_grad:
            hidden_states.requires_grad_()
        return hidden_states

    def _rotary_table(
        self, input_ids: Tensor | None, position_ids: Tensor | None, packed: PackedSeqParams | None
    ) -> Tensor:
        if position_ids is None:
            position_ids = self._default_positions(input_ids, packed)
        shape = self.config.shape
        if (shape.rope_scaling or {}).get("rope_type") in LENGTH_DEPENDENT:
            frequencies = rope_frequencies(shape, self._sequence_length(position_ids))
        else:
            if self._frequencies is None:
                self._frequencies = rope_frequencies(shape)
            frequencies = self._frequencies
        inv_freq, attention_factor = frequencies
        dtype = torch.float32 if self.config.fp32_residual_connection else self.config.params_dtype
        return rotary_table(position_ids, inv_freq.to(position_ids.device), attention_factor, dtype)

    def _sequence_length(self, position_ids: Tensor) -> int:
        """Largest position + 1, of all tokens that context-parallel ranks hold."""
        largest = position_ids.max()
        if self.config.context_parallel_size > 1:
            torch.distributed.all_reduce(
                largest, torch.distributed.ReduceOp.MAX, group=parallel_state.get_context_parallel_group()
            )
        return int(largest) + 1

    def _default_positions(self, input_ids: Tensor | None, packed: PackedSeqParams | None) -> Tensor:
        if self.config.context_parallel_size > 1:
            raise ValueError(
                "position_ids must be given under context parallelism: a rank's tokens are not consecutive"
            )
        if input_ids is not None:
            length, device = input_ids.shape[1], input_ids.device
        else:
            received = self.decoder.input_tensor
            length, device = received.shape[0], received.device
            length *= self.tp_group.size() if self.config.sequence_parallel else 1
        positions = torch.arange(length, device=device)
        if packed is not None:
            starts = packed.cu_seqlens_q
            positions -= torch.repeat_interleave(starts[:-1], starts.diff()).to(positions)
        return positions[None]

    def _check_cache_is_used(self, packed_seq_params: PackedSeqParams | None) -> None:
        config = self.config
        # Dropout would spoil what is stored, and megatron's recomputation calls the layers without a cache.
        training = config.hidden_dropout or config.attention_dropout or config.recomputes
        if packed_seq_params is not None or (self.training and training) or config.context_parallel_size > 1:
            raise ValueError(
                "a cache is for evaluation (model.eval()) of rows that are not packed and not shared by ranks"
            )

    def _further_targets(
        self, input_ids: Tensor, labels: Tensor, packed: PackedSeqParams | None
    ) -> list[tuple[Tensor, Tensor]]:
        if self.config.context_parallel_size > 1:
            raise ValueError("further must be given under context parallelism: a rank has only a part of each row")
        bounds = None if packed is None else packed.cu_seqlens_q
        return further_targets(input_ids, labels, bounds, self.config.shape.mtp_num_layers)

    def _losses(
        self,
        hidden_states: Tensor,
        labels: Tensor,
        further: Sequence[tuple[Tensor, Tensor]],
        table: Tensor,
        packed: PackedSeqParams | None,
        padding_mask: Tensor | None,
    ) -> Tensor:
        """[1 + prediction layers] loss sums."""
        losses = [self._loss_sum(hidden_states, labels)]
        for layer, (ids, targets) in zip(self.mtp.layers, further, strict=True):
            hidden_states = layer(self._embed(ids), hidden_states, table, packed, padding_mask)
            losses.append(self._loss_sum(hidden_states, targets))
        return torch.stack(losses)

    def output_operands(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """What is multiplied for the logits: [..., h] and [v_local, h], or both wider for an adapter's rank."""
        weight = self.output_weight()
        join = getattr(self.output_layer, "joined_operands", None)
        return (hidden_states, weight) if join is None else join(hidden_states, weight)

    @in_range("module: output_layer")
    def _loss_sum(self, hidden_states: Tensor, labels: Tensor) -> Tensor:
        if self.config.sequence_parallel:
            hidden_states = tensor_parallel.gather_from_sequence_parallel_region(hidden_states, group=self.tp_group)
        else:
            hidden_states = tensor_parallel.copy_to_tensor_model_parallel_region(hidden_states, group=self.tp_group)
        hidden_states, weight = self.output_operands(hidden_states)
        return linear_cross_entropy_sum(
            hidden_states.flatten(0, 1),
            weight,
            labels.t().reshape(-1),
            vocab_size=self.config.shape.vocab_size,
            group=self.tp_group,
            chunk_rows=self.config.loss_chunk_size,
        )

    def _logits(self, hidden_states: Tensor, last_position_only: bool, gather: bool) -> Tensor:
        sequence_parallel = self.config.sequence_parallel
        if last_position_only:
            if sequence_parallel:
                raise ValueError("last_position_only does not go with sequence parallelism")
            hidden_states = hidden_states[-1:]
        logits, _ = self.output_layer(hidden_states, weight=self.output_weight(), runtime_gather_output=gather)
        logits = logits.transpose(0, 1)
        vocab_size = self.config.shape.vocab_size
        if gather:
            return logits[..., :vocab_size]
        start = self.tp_group.rank() * logits.shape[-1]
        true_columns = max(0, vocab_size - start)
        if true_columns < logits.shape[-1]:
            padded = torch.arange(logits.shape[-1], device=logits.device) >= true_columns
            logits = logits.masked_fill(padded, float("-inf"))
        return logits
