"""From a plan to a model that can be trained: processes, weights, what is frozen, adapters, DDP."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from mindspeed_llm import accelerator
from mindspeed_llm.errors import UserError
from mindspeed_llm.plan.plan import Plan
from mindspeed_llm.training.freeze import freeze_parameters

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class TrainingModel:
    """A model on this rank.

    Attributes:
        chunks: virtual stages as built (one without virtual pipeline).
        wrapped: the same inside megatron-core's DistributedDataParallel.
        trained: local names of the trained parameters.
    """

    chunks: list[torch.nn.Module]
    wrapped: list[torch.nn.Module]
    trained: list[str]


def start_processes(plan: Plan) -> None:
    """Device, threads, process groups and seeds.

    Raises:
        UserError: the asked device is not there.
    """
    from mindspeed_llm import megatron_adaptor
    from mindspeed_llm.parallel.setup import initialize_distributed

    # megatron-core 0.16 calls what torch 2.13 calls by a newer name; users can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|megatron")
    megatron_adaptor.patch()
    r = plan.config.runtime
    if r.device != "auto":
        accelerator.select(r.device)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(r.num_threads or max(len(os.sched_getaffinity(0)) // local, 1))
    choose_operators(plan)
    initialize_distributed(
        tensor_parallel_size=plan.tensor_parallel_size,
        pipeline_parallel_size=plan.pipeline_parallel_size,
        virtual_pipeline_parallel_size=plan.layout.vpp,
        context_parallel_size=plan.layout.cp,
        expert_parallel_size=plan.layout.ep,
        expert_tensor_parallel_size=plan.layout.etp,
        seed=plan.config.data.seed,
        timeout_minutes=r.distributed_timeout_minutes,
    )


def is_leader() -> bool:
    """Whether this process speaks for the run (global rank 0)."""
    return not dist.is_initialized() or dist.get_rank() == 0


def is_logger() -> bool:
    """Whether this process writes log lines: the last rank, which has the loss, as in Megatron."""
    return not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1


# Option -> the operators it switches between their best form and the plain reference.
FUSED_OPERATORS = {
    "use_flash_attn": ("attention",),
    "use_fused_rmsnorm": ("rms_norm",),
    "use_fused_swiglu": ("swiglu",),
    "use_fused_rotary_pos_emb": ("rotary", "split_qkv_rotary"),
}


def choose_operators(plan: Plan) -> None:
    """Use the plain reference of every operator that is switched off, and the best form of the others."""
    from mindspeed_llm import ops
    from mindspeed_llm.ops import registry

    ops.load_all()
    registry.reset()
    for option, operators in FUSED_OPERATORS.items():
        if not plan.config.get(option):
            for operator in operators:
                registry.select(operator, registry.REFERENCE)


def build_options(plan: Plan, *, initialize: bool) -> Any:
    """The builder's view of the plan."""
    from mindspeed_llm.models.build import BuildOptions

    c = plan.config
    return BuildOptions(
        tensor_parallel_size=plan.tensor_parallel_size,
        pipeline_parallel_size=plan.pipeline_parallel_size,
        virtual_pipeline_parallel_size=plan.layout.vpp,
        context_parallel_size=plan.layout.cp,
        expert_parallel_size=plan.layout.ep,
        expert_tensor_parallel_size=plan.layout.etp,
        sequence_parallel=plan.sequence_parallel,
        params_dtype=DTYPES[plan.dtype_name],
        padded_vocab_size=plan.padded_vocab_size,
        hidden_dropout=c.model.hidden_dropout,
        attention_dropout=c.model.attention_dropout,
        recompute_granularity=c.training.recompute_granularity,
        recompute_method=c.training.recompute_method,
        recompute_num_layers=c.training.recompute_num_layers,
        loss_chunk_size=c.operators.loss_chunk_size,
        variable_seq_lengths=plan.pipeline_parallel_size > 1,
        seed=c.data.seed,
        initialize=initialize,
    )


def build(plan: Plan) -> TrainingModel:
    """The model with its weights, adapters and frozen parameters, wrapped for data parallelism.

    Raises:
        UserError: weights do not fit, or a --trainable / --freeze pattern matches no parameter.
    """
    from mindspeed_llm.models.build import build_model

    if plan.weights is None and is_leader():
        print(f" weights: random, drawn with seed {plan.config.data.seed}; nothing is loaded", flush=True)
    chunk = build_model(plan.shape, build_options(plan, initialize=plan.weights is None))
    # A resume restores the weights together with the optimizer (but a LoRA run's base comes from elsewhere).
    if plan.weights is not None and plan.resume is not plan.weights:
        load_weights(plan, chunk)
    trained = choose_trained(plan, chunk)
    if plan.adapters is not None:
        from mindspeed_llm.lora.inject import inject_adapters

        trained += inject_adapters(chunk, plan.adapters, seed=plan.config.data.seed)
        if plan.adapter_source is not None and plan.resume is not plan.adapter_source:
            from mindspeed_llm.lora.io import load_adapters

            load_adapters(chunk, plan.adapter_source.directory, plan.adapter_source.format, plan.adapters)
    return TrainingModel([chunk], [wrap(plan, chunk)], trained)


def load_weights(plan: Plan, chunk: torch.nn.Module) -> None:
    """Fill this rank's parameters from `plan.weights`, strictly, and say how much was loaded."""
    from megatron.core import parallel_state

    from mindspeed_llm.checkpoint.detect import open_source
    from mindspeed_llm.checkpoint.load import Placement, load_into, truncated

    source = open_source(plan.weights, plan.stored_shape)
    if plan.shape.num_layers != plan.stored_shape.num_layers:
        source = truncated(source, plan.shape.num_layers)
    placement = Placement(
        plan.layout.layers,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp=plan.tensor_parallel_size,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
    )
    load_into(chunk, source, placement, quiet=not is_leader())


def choose_trained(plan: Plan, chunk: torch.nn.Module) -> list[str]:
    """Set requires_grad by the options (a LoRA base is frozen but for --trainable); names of what is trained."""
    t = plan.config.training
    if plan.adapters is not None and not t.trainable:
        chunk.requires_grad_(False)
        return []
    offset = chunk.decoder.layers[0].layer_number - 1 if len(chunk.decoder.layers) else 0
    trained, matched = freeze_parameters(
        chunk.named_parameters(),
        num_layers=plan.shape.num_layers,
        layer_offset=offset,
        trainable=t.trainable,
        freeze=t.freeze,
        trainable_layers=t.trainable_layers,
        frozen_layers=t.frozen_layers,
    )
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, (sorted(matched), bool(trained)))
    for pattern in [*(t.trainable or ()), *(t.freeze or ())]:
        if not any(pattern in seen for seen, _ in everywhere):
            example = next(iter(chunk.named_parameters()))[0]
            raise UserError(f"--trainable/--freeze: {pattern!r} matches no parameter; names look like {example}")
    if not any(some for _, some in everywhere):
        raise UserError("training: every parameter is frozen; leave something to train")
    return sorted(trained)


def wrap(plan: Plan, chunk: torch.nn.Module) -> torch.nn.Module:
    """megatron-core's DistributedDataParallel; gradients accumulate and reduce in fp32."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    p = plan.config.parallel
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=p.overlap_grad_reduce,
        overlap_param_gather=p.overlap_param_gather,
        use_distributed_optimizer=p.use_distributed_optimizer,
    )
    wrapped = DistributedDataParallel(chunk.config, settings, chunk)
    chunk.config.finalize_model_grads_func = finalize_model_grads
    if p.overlap_grad_reduce:
        chunk.config.no_sync_func = wrapped.no_sync
    if p.overlap_param_gather:
        chunk.config.param_sync_func = wrapped.start_param_sync
    return wrapped
