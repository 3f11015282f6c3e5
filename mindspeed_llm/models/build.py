"""The only place that makes a model configuration and a model."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from packaging.version import Version

from mindspeed_llm import accelerator
from mindspeed_llm.accelerator import torch_facade
from mindspeed_llm.errors import UserError
from mindspeed_llm.models import layouts
from mindspeed_llm.models.layouts import padded_vocab_size
from mindspeed_llm.models.moe.options import ExpertOptions, expert_fields
from mindspeed_llm.models.recompute_options import RecomputeOptions
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.parallel.layer_map import LayerMap, layer_map

if TYPE_CHECKING:
    from mindspeed_llm.models.config import ModelConfig

__all__ = ["BuildOptions", "build_chunks", "build_model", "model_config", "padded_vocab_size"]

# Before megatron is loaded, which the functions below do.
torch_facade.install(accelerator.current())


@dataclass(frozen=True)
class BuildOptions:
    """How a model of a given shape is cut up, stored and recomputed; nothing here changes the function it computes.

    Args:
        tensor_parallel_size, pipeline_parallel_size, virtual_pipeline_parallel_size, context_parallel_size,
            expert_parallel_size, expert_tensor_parallel_size: of the parallel state that is already initialised.
        ulysses_size: context-parallel ranks that exchange heads (`parallel.context_split`); the others form a ring.
        ring_window: ranks of an inner ring of that ring; 1 for a single ring.
        layers: which layers live on which stage and chunk; None splits evenly over the two pipeline sizes.
        sequence_parallel: keep the residual stream cut along the sequence between the tensor-parallel regions.
        params_dtype: of all parameters.
        vocab_divisible_by: the vocabulary is padded to a multiple of this times the tensor-parallel size.
        padded_vocab_size: rows of the embedding over all ranks, where a checkpoint dictates them; overrides the former.
        hidden_dropout, attention_dropout: probabilities while training; attention_dropout None takes the shape's.
        recompute_granularity, recompute_method, recompute_num_layers, recompute_modules: as in megatron-core.
        calculate_per_token_loss: gradients are divided by the global number of labelled tokens (by megatron, which
            needs the count from the loss function); False averages micro-batches instead.
        mtp_loss_scaling_factor: weight of the mean loss of the multi-token prediction layers beside the model's own.
        loss_chunk_size: labelled tokens whose logits exist at once in the loss; None chooses by memory.
        gradient_accumulation_fusion: linears add weight gradients to `main_grad` inside the product.
        communication_chunks: chunks in which linears overlap sending with multiplying, see `ModelConfig`.
        quantized_linears: linears of the layers hold NF4, filled by loading, see `ModelConfig`.
        experts: how routed experts are computed and balanced.
        variable_seq_lengths: pipeline stages tell each other the shape of every micro-batch.
        recompute: parts of layers that are recomputed beside those.
        on_host: parameters are made in host memory, for whoever wraps the model to bring to the device in parts.
        seed: of the initial weights.
        initialize: False leaves the weights undefined, for a checkpoint to fill.
    """

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    virtual_pipeline_parallel_size: int | None = None
    context_parallel_size: int = 1
    ulysses_size: int = 1
    ring_window: int = 1
    expert_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None
    layers: LayerMap | None = None
    sequence_parallel: bool = False
    params_dtype: torch.dtype = torch.float32
    vocab_divisible_by: int = layouts.VOCAB_MULTIPLE
    padded_vocab_size: int | None = None
    hidden_dropout: float = 0.0
    attention_dropout: float | None = None
    recompute_granularity: str | None = None
    recompute_method: str | None = None
    recompute_num_layers: int | None = None
    recompute_modules: Sequence[str] = field(default_factory=lambda: ("core_attn",))
    calculate_per_token_loss: bool = True
    mtp_loss_scaling_factor: float = 0.1
    loss_chunk_size: int | None = None
    gradient_accumulation_fusion: bool = False
    communication_chunks: int | None = None
    quantized_linears: bool = False
    experts: ExpertOptions = field(default_factory=ExpertOptions)
    variable_seq_lengths: bool = False
    recompute: RecomputeOptions = field(default_factory=RecomputeOptions)
    on_host: bool = False
    seed: int = 1234
    initialize: bool = True


def check_megatron_version() -> None:
    """Refuse a megatron-core whose layers lack what our models pass them.

    Raises:
        UserError: it is older than 0.16.
    """
    found = importlib.metadata.version("megatron-core")
    if Version(found) < Version("0.16"):
        raise UserError(
            f"megatron-core: {found} is wrong, because its layers lack the padding mask of routers, new in 0.16; "
            "legal: >=0.16,<0.17 (0.15 with mindspeed_llm.megatron_adaptor and megatron's own models); "
            "try: pip install megatron-core==0.16.1"
        )


def model_config(shape: ModelShape, options: BuildOptions):
    """The `models.config.ModelConfig` of a shape under these options.

    Raises:
        UserError: the shape cannot be cut that way, its activation is not implemented, or megatron-core is too old.
    """
    check_megatron_version()
    from mindspeed_llm.models.config import ModelConfig
    from mindspeed_llm.models.mlp import activation_function

    tp = options.tensor_parallel_size
    layouts.check_tensor_parallel(shape, tp)
    layouts.check_expert_parallel(shape, options.expert_parallel_size, options.expert_tensor_parallel_size or tp)
    attention_dropout = shape.attention_dropout if options.attention_dropout is None else options.attention_dropout
    if options.context_parallel_size > 1 and attention_dropout:
        raise UserError(
            f"attention_dropout: {attention_dropout} is wrong, because context-parallel ranks do not draw weights to "
            "drop; legal: 0"
        )
    if options.context_parallel_size > 1 and shape.attention_softcap is not None:
        raise UserError(
            f"attn_logit_softcapping: {shape.attention_softcap} is wrong, because context-parallel ranks do not bound "
            "scores; legal: none; try: --context-parallel-size 1"
        )
    padded = options.padded_vocab_size or padded_vocab_size(shape.vocab_size, tp, options.vocab_divisible_by)
    layouts.vocab_range(shape.vocab_size, padded, 0, tp)
    return ModelConfig(
        shape=shape,
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels,
        normalization=shape.normalization,
        layernorm_epsilon=shape.norm_epsilon,
        activation_func=activation_function(shape.activation),
        gated_linear_unit=shape.gated_linear_unit,
        qk_layernorm=shape.qk_layernorm,
        init_method_std=shape.init_method_std,
        add_bias_linear=False,
        add_qkv_bias=shape.add_qkv_bias,
        add_attention_output_bias=shape.add_attention_output_bias,
        add_mlp_bias=shape.add_mlp_bias,
        padded_vocab_size=padded,
        loss_chunk_size=options.loss_chunk_size,
        accumulate_weight_gradients=options.gradient_accumulation_fusion,
        communication_chunks=options.communication_chunks,
        quantized_linears=options.quantized_linears,
        hidden_dropout=options.hidden_dropout,
        attention_dropout=attention_dropout,
        params_dtype=options.params_dtype,
        pipeline_dtype=options.params_dtype,
        bf16=options.params_dtype == torch.bfloat16,
        fp16=options.params_dtype == torch.float16,
        # Several processes of one host share its memory; a checkpoint or initialize_weights fills the tensors.
        perform_initialization=False,
        use_cpu_initialization=options.on_host,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=options.pipeline_parallel_size,
        virtual_pipeline_model_parallel_size=options.virtual_pipeline_parallel_size,
        context_parallel_size=options.context_parallel_size,
        ulysses_size=options.ulysses_size,
        ring_window=options.ring_window,
        expert_model_parallel_size=options.expert_parallel_size,
        expert_tensor_parallel_size=options.expert_tensor_parallel_size,
        pipeline_model_parallel_layout=_pipeline_layout(shape, options),
        # Between two stages the batched form cannot tell what goes to the next stage from what goes to the previous
        # one, which is the same rank; an interleaved schedule sends both.
        overlap_p2p_comm=options.virtual_pipeline_parallel_size is not None,
        batch_p2p_comm=options.virtual_pipeline_parallel_size is None,
        multi_latent_attention=shape.multi_latent_attention,
        mtp_num_layers=shape.mtp_num_layers or None,
        mtp_loss_scaling_factor=options.mtp_loss_scaling_factor,
        sequence_parallel=options.sequence_parallel and tp > 1,
        recompute_granularity=options.recompute_granularity,
        recompute_method=options.recompute_method,
        recompute_num_layers=options.recompute_num_layers,
        recompute_modules=list(options.recompute_modules),
        recompute=options.recompute,
        calculate_per_token_loss=options.calculate_per_token_loss,
        variable_seq_lengths=options.variable_seq_lengths,
        **expert_fields(shape, options.experts),
        cuda_graph_scope=[],
        # The fused kernels behind these need Apex or Transformer Engine; ours are in ops.
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
    )


def _pipeline_layout(shape: ModelShape, options: BuildOptions) -> list[list[str]] | None:
    """The layer map as megatron-core takes it: what each chunk holds, in forward order; None for a single stage."""
    pp, vpp = options.pipeline_parallel_size, options.virtual_pipeline_parallel_size
    if pp == 1:
        return None
    layers = options.layers or layer_map(shape.num_layers, pp, vpp)
    first, *middle, last = [["decoder"] * size for size in layers.built_sizes]
    return [["embedding", *first], *middle, [*last, *["mtp"] * shape.mtp_num_layers, "loss"]]


def build_chunks(shape: ModelShape, options: BuildOptions) -> list:
    """This rank's model chunks in forward order, one without virtual pipeline; they share one configuration.

    Raises:
        UserError: the shape cannot be cut that way.
    """
    config = model_config(shape, options)
    virtual = options.virtual_pipeline_parallel_size
    stages = [None] if virtual is None else range(virtual)
    return [build_model(shape, options, vp_stage=stage, config=config) for stage in stages]


def build_model(
    shape: ModelShape,
    options: BuildOptions | None = None,
    *,
    pre_process: bool | None = None,
    post_process: bool | None = None,
    vp_stage: int | None = None,
    config: ModelConfig | None = None,
):
    """This rank's part of a model, on the current device or in host memory (`BuildOptions.on_host`).

    `parallel.setup.initialize_distributed` must have been called with the sizes in `options`.

    Args:
        shape: the architecture.
        options: see `BuildOptions`; None means one rank, fp32.
        pre_process, post_process: whether this part holds the embedding and the output layer; None asks the parallel
            state.
        vp_stage: number of the virtual stage, None without virtual pipeline stages.
        config: of these shape and options, where the caller made it already.

    Returns:
        A `models.gpt.LanguageModel` (a megatron GPTModel).

    Raises:
        UserError: the shape cannot be cut that way.
    """
    from megatron.core import parallel_state

    from mindspeed_llm.models.gpt import LanguageModel
    from mindspeed_llm.models.initialize import initialize_weights, mark_tensor_parallel

    options = options or BuildOptions()
    config = config or model_config(shape, options)
    if pre_process is None:
        pre_process = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
    if post_process is None:
        post_process = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
    model = LanguageModel(config, pre_process=pre_process, post_process=post_process, vp_stage=vp_stage)
    mark_tensor_parallel(model)
    if options.initialize:
        initialize_weights(model, options.seed)
    return model
