"""From a plan to a model that can be trained: processes, weights, what is frozen, adapters, DDP."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from mindspeed_llm import accelerator
from mindspeed_llm.accelerator import host_allocator
from mindspeed_llm.config.hccl_groups import parse_buffers
from mindspeed_llm.config.parallel import RuntimeConfig
from mindspeed_llm.plan.plan import Plan
from mindspeed_llm.training.build_options import build_options, communication_chunks
from mindspeed_llm.training.gradient_sums import add_gradients_by_rows
from mindspeed_llm.training.swapping import swap_activations

if TYPE_CHECKING:
    from mindspeed_llm.checkpoint.load import Placement
    from mindspeed_llm.memory.swap import ActivationSwap


@dataclass
class TrainingModel:
    """A model on this rank.

    Attributes:
        chunks: virtual stages as built (one without virtual pipeline).
        wrapped: the same inside megatron-core's DistributedDataParallel.
        trained: local names of the trained parameters, for each chunk.
        swap: what swaps activations, if anything does.
    """

    chunks: list[torch.nn.Module]
    wrapped: list[torch.nn.Module]
    trained: list[list[str]]
    swap: ActivationSwap | None = None

    @property
    def num_trained(self) -> int:
        """Trained tensors on this rank."""
        return sum(len(names) for names in self.trained)


def start_processes(plan: Plan) -> None:
    """Device, threads, what becomes of freed memory, process groups and seeds.

    Raises:
        UserError: the asked device is not there, or ranks were started differently.
    """
    from mindspeed_llm import patches
    from mindspeed_llm.parallel.launch import check_agreement, check_devices
    from mindspeed_llm.parallel.setup import initialize_distributed, initialize_process_group
    from mindspeed_llm.training.facts import launch_facts

    # megatron-core 0.16 calls what torch 2.13 calls by a newer name; users can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|megatron")
    patches.apply()
    r = plan.config.runtime
    if r.device != "auto":
        accelerator.select(r.device)
    _configure_npu(r)
    if r.cpu_allocator == "keep":
        host_allocator.keep_freed_memory()
    torch.set_num_threads(r.num_threads or default_threads(os.environ))
    choose_operators(plan)
    check_devices()
    initialize_process_group(r.distributed_timeout_minutes)
    check_agreement(launch_facts(plan), "versions or flags")
    initialize_distributed(
        tensor_parallel_size=plan.tensor_parallel_size,
        pipeline_parallel_size=plan.pipeline_parallel_size,
        virtual_pipeline_parallel_size=plan.layout.vpp,
        context_parallel_size=plan.layout.cp,
        expert_parallel_size=plan.layout.ep,
        expert_tensor_parallel_size=plan.layout.etp,
        ulysses_size=plan.layout.ulysses,
        seed=plan.config.data.seed,
        timeout_minutes=r.distributed_timeout_minutes,
    )


def default_threads(environment: Mapping[str, str]) -> int:
    """CPU threads of this process: OMP_NUM_THREADS where it is the user's, else a process's share of the cores.

    torchrun sets OMP_NUM_THREADS=1 for processes that have none, so of several processes a 1 tells nothing.
    """
    processes = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    chosen = environment.get("OMP_NUM_THREADS", "")
    if chosen.isdigit() and int(chosen) > 0 and (processes == 1 or chosen != "1"):
        return int(chosen)
    return max(len(os.sched_getaffinity(0)) // processes, 1)


def is_leader() -> bool:
    """Whether this process speaks for the run (global rank 0)."""
    return not dist.is_initialized() or dist.get_rank() == 0


def is_logger() -> bool:
    """Whether this process writes log lines: the last rank, which has the loss, as in Megatron."""
    return not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1


def _configure_npu(runtime: RuntimeConfig) -> None:
    """What the options of Ascend change in the device, before process groups are made."""
    if runtime.hccl_group_buffer is not None:
        accelerator.current().set_group_buffers(parse_buffers(runtime.hccl_group_buffer))
    if runtime.npu_deterministic:
        accelerator.current().be_deterministic()


# Option -> the operators it switches between their best form and the plain reference.
FUSED_OPERATORS = {
    "use_flash_attn": (
        "attention",
        "packed_attention",
        "attention_part",
        "attention_part_backward",
        "attention_merge",
        "masked_attention",
    ),
    "use_fused_rmsnorm": ("rms_norm", "add_rms_norm", "layer_norm"),
    "use_fused_swiglu": ("swiglu", "gated_activation"),
    "use_fused_rotary_pos_emb": ("rotary", "neighbour_rotary", "split_qkv_rotary"),
    "cross_entropy_loss_fusion": ("linear_cross_entropy_sum", "vocab_parallel_cross_entropy"),
}

# --optimizer-selection -> the implementation of AdamW's step; None is the best of the device.
ADAMW_STEPS = {"fused_adamw": None, "fused_torch_adamw": "torch-fused", "adamw": "reference"}

# --lora-kernels -> the operators that Triton computes.
BESIDE_THE_BASE = ("adapter_down", "adapter_down_gradient", "adapter_up")
LORA_KERNELS = {"torch": (), "triton": BESIDE_THE_BASE, "triton-base": (*BESIDE_THE_BASE, "adapted_product")}


def choose_operators(plan: Plan) -> None:
    """Use the plain reference of every operator that is switched off, and the best form of the others."""
    from mindspeed_llm import ops
    from mindspeed_llm.ops import compiled, registry

    ops.load_all()
    registry.reset()
    if plan.config.operators.compile_operators:
        for operator in compiled.operators():
            registry.select(operator, compiled.NAME)
    for option, operators in FUSED_OPERATORS.items():
        if not plan.config.get(option):
            for operator in operators:
                registry.select(operator, registry.REFERENCE)
    if step := ADAMW_STEPS[plan.config.optimizer.optimizer_selection]:
        registry.select("adamw", step)
    for operator in LORA_KERNELS[plan.config.lora.lora_kernels]:
        registry.select(operator, "triton")
    if plan.config.operators.use_ascend_mc2:
        registry.select("all_gather_matmul", "npu_all_gather_base_mm")
        registry.select("matmul_reduce_scatter", "npu_mm_reduce_scatter_base")


def build(plan: Plan) -> TrainingModel:
    """The model with its weights, adapters and frozen parameters, wrapped for data parallelism.

    Raises:
        UserError: weights do not fit, or a --trainable / --freeze pattern matches no parameter.
    """
    from mindspeed_llm.models.build import build_chunks
    from mindspeed_llm.models.moe.auxiliary_loss import forget_loss_scale

    forget_loss_scale()
    if plan.weights is None and is_leader():
        print(f" weights: random, drawn with seed {plan.config.data.seed}; nothing is loaded", flush=True)
    chunks = build_chunks(plan.shape, build_options(plan, initialize=plan.weights is None))
    # A resume restores the weights together with the optimizer (but a LoRA run's base comes from elsewhere).
    if plan.weights is not None and plan.resume is not plan.weights:
        load_weights(plan, chunks)
    trained = choose_trained(plan, chunks)
    if plan.adapters is not None:
        from mindspeed_llm.lora.inject import inject_adapters

        for chunk, names in zip(chunks, trained):
            names += inject_adapters(chunk, plan.adapters, seed=plan.config.data.seed)
        if plan.adapter_source is not None and plan.resume is not plan.adapter_source:
            from mindspeed_llm.lora.io import load_adapters

            where, kind = plan.adapter_source.directory, plan.adapter_source.format
            number = sum(load_adapters(chunk, where, kind, plan.adapters) for chunk in chunks)
            say_adapters(f"{number} adapter tensors", plan)
        choose_fusion(plan, chunks)
    return TrainingModel(chunks, wrap(plan, chunks), trained, swap_activations(plan, chunks))


def say_adapters(what: str, plan: Plan) -> None:
    """Say on rank 0 whose adapters were loaded; nothing else in a run's output would show that they are in use."""
    if is_leader():
        sources = [plan.adapter_source, *(source for source, _ in plan.further_adapters)]
        print(f"loaded {what} from {', '.join(str(source.directory) for source in sources)}", flush=True)


def choose_fusion(plan: Plan, chunks: list[torch.nn.Module]) -> None:
    """How adapted linears are computed; says what was measured for it, if anything was."""
    from mindspeed_llm.lora.fusion.configure import configure_fusion, describe

    lora = plan.config.lora
    number = lora.lora_fusion_chunks or communication_chunks(plan.config.operators)
    how = {"fused": lora.lora_fusion, "combine": lora.lora_fusion_combine, "prepack": lora.lora_prepack}
    rates = configure_fusion(chunks, chunks=number, **how)
    if rates is not None and is_leader():
        rows = plan.config.training.micro_batch_size * plan.seq_length // plan.layout.cp
        print(*describe(rates, chunks, rows), sep="\n", flush=True)


def placement(plan: Plan, chunk: int) -> Placement:
    """Where one of this rank's model chunks stands."""
    from mindspeed_llm.checkpoint.load import Placement

    here = plan.layout.coordinates(dist.get_rank())
    return Placement(
        plan.layout.layers,
        tp_rank=here.tp,
        tp=plan.layout.tp,
        pp_rank=here.pp,
        vpp_rank=chunk,
        ep_rank=here.ep,
        ep=plan.layout.ep,
        etp_rank=here.etp,
        etp=plan.layout.expert_tp,
    )


def load_weights(plan: Plan, chunks: list[torch.nn.Module]) -> None:
    """Fill this rank's parameters from `plan.weights`, strictly, and say how much was loaded."""
    from mindspeed_llm.checkpoint.detect import open_source
    from mindspeed_llm.checkpoint.load import load_into, part_of
    from mindspeed_llm.checkpoint.quantized import DequantizedSource

    source = open_source(plan.weights, plan.stored_shape)
    if plan.shape != plan.stored_shape:
        source = part_of(source, plan.shape)
    if plan.quantized and not plan.holds_nf4 and plan.config.lora.qlora_merge_base == "dequantized":
        source = DequantizedSource(source)
    for number, chunk in enumerate(chunks):
        load_into(chunk, source, placement(plan, number), quiet=not is_leader())


def choose_trained(plan: Plan, chunks: list[torch.nn.Module]) -> list[list[str]]:
    """Set requires_grad by the options (a LoRA base is frozen but for --trainable).

    Returns:
        Local names of what is trained, for each chunk.

    Raises:
        UserError: a pattern matches no parameter of any stage, or nothing is left to train.
    """
    parts = plan.trained
    matched: set[str] = set()
    for number, chunk in enumerate(chunks):
        here = placement(plan, number)
        for local, parameter in chunk.named_parameters():
            name = here.stored_name(local, plan.shape)
            parameter.requires_grad_(parts.has(name))
            matched |= parts.patterns_of(name)
    if parts.nothing:
        return [[] for _ in chunks]
    trained = [sorted(name for name, p in chunk.named_parameters() if p.requires_grad) for chunk in chunks]
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, (sorted(matched), any(trained)))
    parts.check_found({pattern for seen, _ in everywhere for pattern in seen}, any(some for _, some in everywhere))
    return trained


def wrap(plan: Plan, chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
    """megatron-core's DistributedDataParallel around every chunk; gradients accumulate and reduce in fp32.

    With --use-torch-fsdp2 the chunks are cut over the data-parallel ranks instead.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    p = plan.config.parallel
    if p.use_torch_fsdp2:
        from mindspeed_llm.training.fully_sharded import fully_sharded

        return [fully_sharded(c, reshard_after_forward=p.torch_fsdp2_reshard_after_forward) for c in chunks]
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=p.overlap_grad_reduce,
        overlap_param_gather=p.overlap_param_gather,
        use_distributed_optimizer=p.use_distributed_optimizer,
    )
    config = chunks[0].config
    # Reductions of later chunks overlap with the backward passes of earlier ones as they are; buckets gain nothing.
    wrapped = [
        DistributedDataParallel(config, settings, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(chunks)
    ]
    if not config.accumulate_weight_gradients:  # else linears have marked and added theirs already
        add_gradients_by_rows(parameter for chunk in chunks for parameter in chunk.parameters())
    config.finalize_model_grads_func = finalize_model_grads
    if p.overlap_grad_reduce:
        functions = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = functions if len(functions) > 1 else functions[0]
    if p.overlap_param_gather:
        for chunk in wrapped:
            wait_for_gathers(chunk)
    return wrapped


def wait_for_gathers(wrapped: torch.nn.Module) -> None:
    """Make every layer wait for the parameters it will use, whichever module they belong to.

    megatron-core waits when a module is called for the parameters of that very module. Here some are used without
    calling theirs: the output layer's weight by the loss, an adapter's factors by its linear.
    """

    def waiting(parameters: list[torch.nn.Parameter]) -> Callable[..., None]:
        groups = dict.fromkeys(wrapped.param_to_bucket_group[p] for p in parameters if p.requires_grad)

        def wait(*unused: Any) -> None:
            for group in groups:
                group.finish_param_sync()

        return wait

    decoder = wrapped.module.decoder
    inside = {p for layer in decoder.layers for p in layer.parameters()}
    for layer in decoder.layers:
        layer.register_forward_pre_hook(waiting(list(layer.parameters())))
    decoder.register_forward_hook(waiting([p for p in wrapped.module.parameters() if p not in inside]))


def gather_parameters(model: TrainingModel) -> None:
    """Bring every rank's parameters up to date: --overlap-param-gather leaves that to the next forward pass."""
    for wrapped in model.wrapped:
        if wrapped.ddp_config.overlap_param_gather:
            wrapped.start_param_sync(force_sync=True)
