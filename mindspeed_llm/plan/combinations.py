"""Options that do not go together, whatever the model."""

from __future__ import annotations

from mindspeed_llm import accelerator
from mindspeed_llm.accelerator import host_allocator, host_compiler, host_products
from mindspeed_llm.config.lora import LoraConfig
from mindspeed_llm.config.run import RunConfig, all_options
from mindspeed_llm.plan.fully_sharded import fully_sharded_problems
from mindspeed_llm.plan.guarding import guarding_problems
from mindspeed_llm.plan.monitoring import monitoring_problems

# What is said about adapters, which has no meaning without any.
OF_ADAPTERS = (
    "lora_alpha", "lora_dropout", "lora_exclude_modules", "lora_layers_to_transform", "lora_rank_pattern",
    "lora_alpha_pattern", "use_rslora", "use_dora", "loraplus_lr_ratio", "lora_kernels",
    "lora_prepack",
)  # fmt: skip


def combination_problems(config: RunConfig) -> list[str]:
    """A line for each combination of options that is refused."""
    return [
        *_training_problems(config),
        *_recompute_problems(config),
        *_swap_problems(config),
        *_optimizer_state_problems(config),
        *_context_parallel_problems(config),
        *fully_sharded_problems(config),
        *_dry_run_and_tokenizer_problems(config),
        *_adapter_problems(config),
        *_operator_and_checkpoint_problems(config),
        *_device_problems(config),
        *monitoring_problems(config),
        *guarding_problems(config),
    ]


def _lines(*checks: tuple[object, str]) -> list[str]:
    """The lines whose condition holds."""
    return [line for condition, line in checks if condition]


def _training_problems(config: RunConfig) -> list[str]:
    t, o, p, r = config.training, config.optimizer, config.parallel, config.runtime
    lengths = [n for n in ("train_iters", "train_epochs", "train_samples") if config.get(n) is not None]
    needs_length = config.door in ("pretrain", "posttrain") and not t.eval_only
    decay = o.lr_decay_iters or t.train_iters
    return _lines(
        (r.bf16 and r.fp16, "--bf16 and --fp16 exclude each other; give one"),
        (len(lengths) > 1, f"{', '.join(all_options()[n].flags[0] for n in lengths)} exclude each other; give one"),
        (needs_length and not lengths and config.door == "pretrain", "--train-iters or --train-epochs is missing"),
        (
            p.overlap_param_gather and not p.use_distributed_optimizer,
            "--overlap-param-gather needs --use-distributed-optimizer",
        ),
        (
            p.overlap_param_gather and not p.overlap_grad_reduce,
            "--overlap-param-gather needs --overlap-grad-reduce",
        ),
        (
            o.lr_warmup_fraction is not None and o.lr_warmup_iters > 0,
            "--lr-warmup-fraction and --lr-warmup-iters exclude each other; give one",
        ),
        (
            needs_length and decay is not None and o.lr_warmup_iters >= decay,
            f"--lr-warmup-iters {o.lr_warmup_iters} does not fit into {decay} iterations of decay; legal: less; try: a "
            "smaller one, or more --lr-decay-iters",
        ),
        (o.lr is not None and o.min_lr > o.lr, f"--min-lr {o.min_lr} is above --lr {o.lr}"),
        (
            t.pad_to_seq_length and t.padding_free,
            "--pad-to-seq-length has a meaning with --no-padding-free only: joined samples have no padding",
        ),
    )


def _recompute_problems(config: RunConfig) -> list[str]:
    r = config.recompute
    full = r.recompute_granularity == "full"
    numbers = {
        "recompute_activation_function_num_layers": r.recompute_activation_function,
        "recompute_norm_num_layers": r.recompute_norm,
        "moe_zero_memory_num_layers": r.moe_zero_memory != "disable",
    }
    parts = ("recompute_activation_function", "recompute_norm", "mla_zero_memory", "recompute_mla_up_proj")
    given = [n for n in parts if config.get(n)] + ["moe_zero_memory"] * (r.moe_zero_memory != "disable")
    counted = r.recompute_num_layers if full and r.recompute_method == "block" else None
    return _lines(
        (
            not full and (r.recompute_method or r.recompute_num_layers),
            "--recompute-method and --recompute-num-layers have a meaning with --recompute-granularity full only",
        ),
        (
            full and not (r.recompute_method and r.recompute_num_layers),
            "--recompute-granularity full needs --recompute-method and --recompute-num-layers; "
            "try: --recompute-method uniform --recompute-num-layers 1",
        ),
        (
            full and r.recompute_method != "block" and given,
            f"{', '.join(all_options()[n].flags[0] for n in given)}: no meaning with --recompute-granularity full, "
            "which recomputes every layer as a whole; legal: --recompute-method block, for the layers behind those",
        ),
        (
            r.recompute_modules and r.recompute_granularity != "selective",
            "--recompute-modules has a meaning with --recompute-granularity selective only",
        ),
        *(
            (
                config.get(name) is not None and not on,
                f"{all_options()[name].flags[0]} has no meaning without "
                f"{all_options()[name.removesuffix('_num_layers')].flags[0]}",
            )
            for name, on in numbers.items()
        ),
        (
            r.recompute_norm and "layernorm" in (r.recompute_modules or ()),
            "--recompute-norm and --recompute-modules layernorm say the same; give one",
        ),
        (
            r.mla_zero_memory and (r.recompute_mla_up_proj or "mla_up_proj" in (r.recompute_modules or ())),
            "--mla-zero-memory recomputes the up projections too; give one",
        ),
        (
            r.enable_recompute_layers_per_pp_rank and not counted and not any(map(config.get, numbers)),
            "--enable-recompute-layers-per-pp-rank has no meaning without a number of layers to count",
        ),
    )


def _swap_problems(config: RunConfig) -> list[str]:
    m, r = config.memory, config.recompute
    full = r.recompute_granularity == "full"
    return _lines(
        (
            m.swap_attention and full and r.recompute_method != "block",
            "--swap-attention has no meaning with --recompute-granularity full, which keeps inputs of layers alone; "
            "legal: --swap-layer-input, or --recompute-method block and the layers behind those",
        ),
        (
            m.swap_layer_input and not full,
            "--swap-layer-input has a meaning with --recompute-granularity full only: other layers keep more than "
            "their input; try: --swap-attention",
        ),
        (
            not m.swap_attention and "swap_modules" in config.given,
            "--swap-modules has no meaning without --swap-attention",
        ),
        (
            not (m.swap_attention or m.swap_layer_input) and "swap_budget" in config.given,
            "--swap-budget has no meaning without --swap-attention or --swap-layer-input",
        ),
    )


def _optimizer_state_problems(config: RunConfig) -> list[str]:
    m, r = config.memory, config.runtime
    return _lines(
        (
            not m.swap_optimizer and "swap_optimizer_times" in config.given,
            "--swap-optimizer-times has no meaning without --swap-optimizer",
        ),
        (
            m.reuse_fp32_param and not r.bf16,
            "--reuse-fp32-param needs --bf16: only a bf16 weight is a half of an fp32 one",
        ),
    )


def _context_parallel_problems(config: RunConfig) -> list[str]:
    """Options of one algorithm that are given with another, or missing."""
    p, problems = config.parallel, []
    hybrid = p.context_parallel_algo == "hybrid_cp_algo"
    if hybrid and p.ulysses_degree_in_cp is None and p.context_parallel_size > 1:
        problems.append("--ulysses-degree-in-cp is missing: hybrid_cp_algo needs it")
    if not hybrid and p.ulysses_degree_in_cp is not None:
        problems.append("--ulysses-degree-in-cp has a meaning with --context-parallel-algo hybrid_cp_algo only")
    if p.context_parallel_algo == "ulysses_cp_algo" and p.cp_window_size > 1:
        problems.append("--cp-window-size has no meaning with ulysses_cp_algo: there is no ring")
    return problems


def _dry_run_and_tokenizer_problems(config: RunConfig) -> list[str]:
    log = config.logging
    k = config.tokenizer
    return _lines(
        (
            not log.dry_run and (log.world_size is not None or log.check_rank is not None),
            "--world-size and --check-rank have a meaning with --dry-run only: "
            "the launcher says how many processes run",
        ),
        (
            k.tokenizer_name_or_path is not None and k.tokenizer_model is not None,
            "--tokenizer-name-or-path and --tokenizer-model exclude each other; give one",
        ),
    )


def _adapter_problems(config: RunConfig) -> list[str]:
    lora = config.lora
    asked = lora.lora_r is not None or lora.lora_target_modules is not None
    defaults = LoraConfig()
    given = [all_options()[n].flags[0] for n in OF_ADAPTERS if config.get(n) != getattr(defaults, n)]
    partial = [n for n in ("trainable", "freeze", "trainable_layers", "frozen_layers") if config.get(n) is not None]
    return _lines(
        (
            config.door not in ("inference", "convert") and len(lora.lora_load or ()) > 1,
            "--lora-load: several sets of adapters are for answering; legal: one, to go on training with",
        ),
        (
            not asked and lora.lora_load is None and given,
            f"{', '.join(given)}: no meaning without --lora-r, --lora-target-modules or --lora-load",
        ),
        (
            asked and bool({"freeze", "trainable_layers", "frozen_layers"} & set(partial)),
            "--freeze, --trainable-layers and --frozen-layers have no meaning with LoRA: the base is frozen already; "
            "--trainable REGEX trains parameters beside the adapters",
        ),
        (
            not lora.lora_fusion and (lora.lora_fusion_combine or lora.lora_fusion_chunks is not None),
            "--lora-fusion-combine and --lora-fusion-chunks have no meaning with --no-lora-fusion",
        ),
        (
            lora.lora_kernels != "torch" and (not lora.lora_fusion or lora.lora_fusion_combine),
            "--lora-kernels has no meaning with --no-lora-fusion or --lora-fusion-combine: its kernels are of fused "
            "linears whose weight and adapter multiply apart",
        ),
        (
            lora.lora_prepack and (not lora.lora_fusion or lora.lora_fusion_combine),
            "--lora-prepack has no meaning with --no-lora-fusion or --lora-fusion-combine: what is laid out is a "
            "frozen weight that multiplies apart from its adapter",
        ),
        (
            lora.lora_prepack and lora.qlora,
            "--lora-prepack does not go with --qlora: the weights are in 4 bits, and dense for one product at a time",
        ),
        (
            lora.lora_prepack and (config.parallel.tensor_model_parallel_size > 1 or config.parallel.use_torch_fsdp2),
            "--lora-prepack needs --tensor-model-parallel-size 1 and goes without --use-torch-fsdp2: where tensors are "
            "sent between products, weights are multiplied as they lie",
        ),
        (
            lora.lora_prepack and not config.runtime.bf16,
            "--lora-prepack needs --bf16: weights of that type alone are laid out",
        ),
        (
            lora.lora_fusion_combine and (lora.lora_dropout > 0 or partial),
            "--lora-fusion-combine does not go with --lora-dropout or --trainable: weight and adapter must multiply "
            "the same input, and the weight must be frozen",
        ),
    )


def _operator_and_checkpoint_problems(config: RunConfig) -> list[str]:
    c, o, p = config.checkpoint, config.operators, config.parallel
    overlapped = o.use_ascend_coc or o.use_ascend_mc2
    cut = p.sequence_parallel and p.tensor_model_parallel_size > 1
    return _lines(
        (
            overlapped and not cut,
            f"--use-ascend-{'mc2' if o.use_ascend_mc2 else 'coc'} needs --sequence-parallel and "
            "--tensor-model-parallel-size of at least 2: what it overlaps gathers and scatters the sequence",
        ),
        (o.use_ascend_coc and o.use_ascend_mc2, "--use-ascend-coc and --use-ascend-mc2 exclude each other; give one"),
        (
            o.use_ascend_mc2 and not (config.runtime.bf16 or config.runtime.fp16),
            "--use-ascend-mc2 needs --bf16 or --fp16: its kernels multiply no fp32",
        ),
        (
            o.loss_chunk_size is not None and not o.cross_entropy_loss_fusion,
            "--loss-chunk-size has no meaning with --no-cross-entropy-loss-fusion: all logits exist",
        ),
        (
            o.loss_compute_mode == "chunk" and not o.cross_entropy_loss_fusion,
            "--loss-compute-mode chunk has no meaning with --no-cross-entropy-loss-fusion: all logits exist",
        ),
        (
            o.coc_parallel_num > 1 and not o.use_ascend_coc,
            "--coc-parallel-num has a meaning with --use-ascend-coc only",
        ),
        (
            c.no_save_optim and config.door in ("pretrain", "posttrain") and c.save is None,
            "--no-save-optim has no meaning without --save",
        ),
        (c.save_hf and c.save is None, "--save-hf has no meaning without --save"),
        (c.save_hf_each_checkpoint and not c.save_hf, "--save-hf-each-checkpoint has a meaning with --save-hf only"),
    )


def _device_problems(config: RunConfig) -> list[str]:
    """Options of one kind of device that are given on another."""
    device = accelerator.current().name if config.runtime.device == "auto" else config.runtime.device
    given = [n for n in ("npu_deterministic", "hccl_group_buffer", "use_ascend_mc2") if config.get(n)]
    problems = _allocator_problems(config.runtime.cpu_allocator, device)
    problems += _compiler_problems(config, device)
    problems += _prepacking_problems(config.lora.lora_prepack, device)
    if config.lora.lora_kernels != "torch" and device != "cuda":
        problems.append(
            f"--lora-kernels {config.lora.lora_kernels} needs a CUDA device, and the device is {device}; try: "
            "--lora-kernels torch"
        )
    if device == "npu":
        return problems + _chip_problems(config)
    return problems + [
        f"--{n.replace('_', '-')} needs an Ascend NPU, and the device is {device}; leave the flag out" for n in given
    ]


def _allocator_problems(wanted: str, device: str) -> list[str]:
    if wanted == "system":
        return []
    if device != "cpu":
        return [f"--cpu-allocator {wanted} has a meaning on a CPU only, and the device is {device}; leave the flag out"]
    reason = host_allocator.why_not()
    return [f"--cpu-allocator: {wanted} is wrong, because {reason}; legal: system"] if reason else []


def _compiler_problems(config: RunConfig, device: str) -> list[str]:
    o = config.operators
    if not o.compile_operators:
        return []
    if device != "cpu":
        return [
            f"--compile-operators has a meaning on a CPU only, and the device is {device}; try: --no-compile-operators"
        ]
    if not (o.use_fused_rmsnorm or o.use_fused_swiglu or o.use_fused_rotary_pos_emb or config.lora.qlora):
        return [
            "--compile-operators has no meaning when norms, gates and rotary embedding are the plain references and "
            "nothing is in NF4; try: --no-compile-operators"
        ]
    reason = host_compiler.why_not()
    return [f"--compile-operators is wrong, because {reason}; try: --no-compile-operators"] if reason else []


def _prepacking_problems(wanted: bool, device: str) -> list[str]:
    if not wanted:
        return []
    if device != "cpu":
        return [f"--lora-prepack has a meaning on a CPU only, and the device is {device}; try: --no-lora-prepack"]
    reason = host_products.why_not()
    return [f"--lora-prepack is wrong, because {reason}; try: --no-lora-prepack"] if reason else []


def _chip_problems(config: RunConfig) -> list[str]:
    npu = accelerator.get("npu")
    if not config.operators.use_ascend_mc2 or not npu.is_available() or npu.ranks_of_fused_communication():
        return []
    return [
        f"--use-ascend-mc2 needs a chip of generation A2 or A3, and this is {npu.model()}; --use-ascend-coc overlaps "
        "on every device"
    ]
