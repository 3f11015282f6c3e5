"""Resolve a configuration against config.json and checkpoint record into one plan; collect every problem on the way."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from dataclasses import dataclass, field
from pathlib import Path

from mindspeed_llm import accelerator
from mindspeed_llm.checkpoint.detect import Found
from mindspeed_llm.checkpoint.load import fewer_predictions, truncated_shape
from mindspeed_llm.config.run import RunConfig, all_options
from mindspeed_llm.errors import UserError
from mindspeed_llm.models.hf_config import read_hf_config, shape_from_hf
from mindspeed_llm.models.layouts import padded_vocab_size
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.parallel.layer_map import layers_of_options
from mindspeed_llm.parallel.layout import ParallelLayout
from mindspeed_llm.plan.adapters import AdapterSettings, adapter_parameters, adapters_asked_for
from mindspeed_llm.plan.base import check_base
from mindspeed_llm.plan.continuity import continue_run
from mindspeed_llm.plan.experts import adapted_experts, expert_problems
from mindspeed_llm.plan.identity import contradictions, shape_from_options
from mindspeed_llm.plan.peft_settings import read_peft_settings
from mindspeed_llm.plan.rules import Rule, batch_rules, context_rules, interleaving_rules, layout_rules, sequence_rules
from mindspeed_llm.plan.source import ADAPTER_FORMATS, find_source

# Names that people know from upstream's --model-type-hf.
UPSTREAM_FAMILIES = {
    "llama2": "llama", "llama3": "llama", "llama31": "llama", "codellama": "llama", "mistral": "llama", "yi": "llama",
    "qwen2": "qwen", "qwen25": "qwen", "qwen3": "qwen", "deepseek2": "deepseek", "deepseek2-lite": "deepseek",
    "deepseek3": "deepseek",
    "qwen2-moe": "qwen_moe", "qwen3-moe": "qwen_moe",
}  # fmt: skip
LONGEST_DEFAULT_SEQUENCE = 4096
# Apex's extension, by the name under which megatron-core imports it.
ACCUMULATING_PRODUCT = "fused_weight_gradient_mlp_cuda"


@dataclass
class Plan:
    """What will be done, every default filled in.

    Attributes:
        shape: architecture of the model in memory (after --truncate-layers).
        stored_shape: architecture of what `weights` holds.
        weights: where weights come from; None means random initial weights.
        base: for an adapter checkpoint in --load, the base model it was trained on.
        resume: continue iteration, optimizer and data position of `weights` (or of the adapters).
        hf_files: directory with config.json and tokenizer files that checkpoints carry along; None for flags alone.
        tokenizer: directory or file, None when no tokenizer is known.
        layout: sizes of all kinds of parallelism and which layers live where.
        rules: every divisibility rule with its legal values, for `--dry-run`.
        notes: things worth saying that are not problems.
    """

    config: RunConfig
    shape: ModelShape
    stored_shape: ModelShape
    weights: Found | None
    adapters: AdapterSettings | None
    adapter_source: Found | None
    resume: Found | None
    hf_files: Path | None
    tokenizer: str | None
    layout: ParallelLayout
    global_batch_size: int
    seq_length: int
    padded_vocab_size: int
    rules: list[Rule] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.layout.world_size

    @property
    def tensor_parallel_size(self) -> int:
        """Processes that share each matrix."""
        return self.layout.tp

    @property
    def pipeline_parallel_size(self) -> int:
        """Pipeline stages."""
        return self.layout.pp

    @property
    def data_parallel_size(self) -> int:
        """Replicas that see different samples."""
        return self.layout.dp

    @property
    def sequence_parallel(self) -> bool:
        """Whether activations are split along the sequence; without tensor parallelism there is nothing to split."""
        return self.config.parallel.sequence_parallel and self.tensor_parallel_size > 1

    @property
    def num_micro_batches(self) -> int:
        """Forward passes per optimizer step and data-parallel rank."""
        return self.global_batch_size // (self.config.training.micro_batch_size * self.data_parallel_size)

    @property
    def dtype_name(self) -> str:
        """Storage type of weights and activations: "bf16", "fp16" or "fp32"."""
        return "bf16" if self.config.runtime.bf16 else "fp16" if self.config.runtime.fp16 else "fp32"

    def trainable_parameters(self) -> int:
        """Trained parameters, adapters counted alone when there are any (freezing by pattern is not counted)."""
        if self.adapters is not None:
            return adapter_parameters(self.shape, self.adapters)
        return self.shape.num_parameters()


def resolve(config: RunConfig, problems: list[str], tokenizer_size: int | None = None) -> Plan:
    """The plan of a training or inference door.

    Args:
        problems: lines already found while parsing; everything found here is raised together with them.
        tokenizer_size: tokens of the tokenizer, needed when the shape comes from flags alone.

    Raises:
        UserError: all problems, a line each.
    """
    problems = list(problems)
    problems += _check_combinations(config)
    sources = _try(problems, lambda: _sources(config, problems), None)
    if sources is None:
        # Without its checkpoint nothing more can be said about the model, only about what was asked of it.
        _try(problems, lambda: adapters_asked_for(config), None)
        raise UserError("\n".join(problems))
    weights, adapter_source, resume = sources
    if resume is not None:
        problems += continue_run(config, resume.record)
    shape, hf_files = _try(problems, lambda: _shape(config, weights, problems, tokenizer_size), (None, None))
    adapters = _try(problems, lambda: _adapters(config, adapter_source, problems), None)
    if shape is None:
        raise UserError("\n".join(problems))
    if adapters is not None and (shape.multi_latent_attention or shape.mtp_num_layers):
        problems.append(
            "lora: adapters for latent attention and multi-token prediction are not implemented; legal: models with "
            "query groups; try: --trainable REGEX without adapters"
        )
    shape, stored_shape = _try(problems, lambda: _without_predictions(config, shape, weights, resume), (shape, shape))
    if adapter_source is not None and weights is not None:
        _try(problems, lambda: check_base(adapter_source, weights, stored_shape), None)
    if config.model.truncate_layers is not None:
        shape = _try(problems, lambda: truncated_shape(shape, config.model.truncate_layers), shape)
    layout = _try(problems, lambda: _layout(config, shape), None)
    if layout is None:
        raise UserError("\n".join(problems))
    plan = _assemble(config, layout, shape, stored_shape, weights, adapter_source, resume, adapters, hf_files)
    problems += expert_problems(config, shape, layout)
    problems += adapted_experts(shape, adapters)
    problems += [rule.problem() for rule in plan.rules if not rule.ok]
    if problems:
        raise UserError("\n".join(problems))
    return plan


def _try(problems, action, otherwise):
    try:
        return action()
    except UserError as wrong:
        problems.append(str(wrong))
        return otherwise


def can_accumulate_in_product() -> bool:
    """Whether megatron-core's linears can add weight gradients to their sums inside the matrix product."""
    on_cuda = accelerator.current().device_type == "cuda"
    return on_cuda and importlib.util.find_spec(ACCUMULATING_PRODUCT) is not None


def _check_combinations(config: RunConfig) -> list[str]:
    t, o, p, r = config.training, config.optimizer, config.parallel, config.runtime
    problems = []

    def refuse(condition, line):
        if condition:
            problems.append(line)

    refuse(r.bf16 and r.fp16, "--bf16 and --fp16 exclude each other; give one")
    lengths = [n for n in ("train_iters", "train_epochs", "train_samples") if config.get(n) is not None]
    refuse(len(lengths) > 1, f"{', '.join(all_options()[n].flags[0] for n in lengths)} exclude each other; give one")
    needs_length = config.door in ("pretrain", "posttrain") and not t.eval_only
    refuse(needs_length and not lengths and config.door == "pretrain", "--train-iters or --train-epochs is missing")
    refuse(
        p.overlap_param_gather and not p.use_distributed_optimizer,
        "--overlap-param-gather needs --use-distributed-optimizer",
    )
    refuse(
        p.overlap_param_gather and not p.overlap_grad_reduce,
        "--overlap-param-gather needs --overlap-grad-reduce",
    )
    refuse(
        t.recompute_granularity != "full" and (t.recompute_method or t.recompute_num_layers),
        "--recompute-method and --recompute-num-layers have a meaning with --recompute-granularity full only",
    )
    refuse(
        o.lr_warmup_fraction is not None and o.lr_warmup_iters > 0,
        "--lr-warmup-fraction and --lr-warmup-iters exclude each other; give one",
    )
    refuse(o.lr is not None and o.min_lr > o.lr, f"--min-lr {o.min_lr} is above --lr {o.lr}")
    refuse(
        t.pad_to_seq_length and t.padding_free,
        "--pad-to-seq-length has a meaning with --no-padding-free only: joined samples have no padding",
    )
    problems += _check_context_parallel(config)
    log = config.logging
    refuse(
        not log.dry_run and (log.world_size is not None or log.check_rank is not None),
        "--world-size and --check-rank have a meaning with --dry-run only: the launcher says how many processes run",
    )
    k = config.tokenizer
    refuse(
        k.tokenizer_name_or_path is not None and k.tokenizer_model is not None,
        "--tokenizer-name-or-path and --tokenizer-model exclude each other; give one",
    )
    lora = config.lora
    asked = lora.lora_r is not None or lora.lora_target_modules is not None
    refuse(
        not asked and lora.lora_load is None and (lora.lora_alpha is not None or lora.lora_dropout > 0),
        "--lora-alpha and --lora-dropout have no meaning without --lora-r, --lora-target-modules or --lora-load",
    )
    partial = [n for n in ("trainable", "freeze", "trainable_layers", "frozen_layers") if config.get(n) is not None]
    refuse(
        asked and bool({"freeze", "trainable_layers", "frozen_layers"} & set(partial)),
        "--freeze, --trainable-layers and --frozen-layers have no meaning with LoRA: the base is frozen already; "
        "--trainable REGEX trains parameters beside the adapters",
    )
    refuse(
        config.operators.gradient_accumulation_fusion and not can_accumulate_in_product(),
        f"--gradient-accumulation-fusion needs a CUDA device and Apex's {ACCUMULATING_PRODUCT}, which is not there; "
        "leave the flag out",
    )
    c = config.checkpoint
    refuse(
        c.no_save_optim and config.door in ("pretrain", "posttrain") and c.save is None,
        "--no-save-optim has no meaning without --save",
    )
    refuse(c.save_hf and c.save is None, "--save-hf has no meaning without --save")
    return problems


def _check_context_parallel(config: RunConfig) -> list[str]:
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


def _sources(config: RunConfig, problems: list[str]):
    """(weights, adapters, what is resumed) from --load, --lora-load and --save."""
    c = config.checkpoint
    weights = find_source(c.load, c.ckpt_step) if c.load is not None else None
    adapter_source = None
    if config.lora.lora_load is not None:
        adapter_source = find_source(config.lora.lora_load)
        if adapter_source is None or adapter_source.format not in ADAPTER_FORMATS:
            raise UserError(f"lora: --lora-load {config.lora.lora_load} holds no adapters of ours or of PEFT")
    if c.load is not None and weights is None:
        if not c.allow_random_init:
            found = sorted(p.name for p in Path(c.load).iterdir())[:5] if Path(c.load).is_dir() else None
            state = "does not exist" if found is None else f"found: {', '.join(found) or 'an empty directory'}"
            raise UserError(
                f"checkpoint: nothing loadable in {c.load} ({state}); "
                "legal: a Hugging Face directory, a Megatron checkpoint, a directory written by --save"
                + ("; try: --allow-random-init to start from random weights" if config.door != "inference" else "")
            )
    if weights is not None and weights.format in ADAPTER_FORMATS:
        if adapter_source is not None:
            raise UserError("lora: --load holds adapters and so does --lora-load; give the base model with --load")
        adapter_source, weights = weights, _base_of(weights)
    started = adapter_source if adapter_source is not None else weights
    resumable = started is not None and started.format in ("torch_dist", "adapter") and started.record.get("resumable")
    resume = started if resumable and not c.finetune and config.door != "inference" else None
    if c.save is not None and find_source(c.save) is not None:
        if resume is None or Path(c.save).resolve() != resume.path.resolve():
            flag = "--lora-load" if find_source(c.save).format == "adapter" else "--load"
            problems.append(
                f"checkpoint: --save {c.save} already holds a checkpoint; try: {flag} {c.save} to resume it, or "
                "another directory"
            )
    return weights, adapter_source, resume


def _without_predictions(
    config: RunConfig, shape: ModelShape, weights: Found | None, resume: Found | None
) -> tuple[ModelShape, ModelShape]:
    """(shape of the model, shape of what is stored) after --mtp-num-layers.

    A Hugging Face directory is opened as if it did not have the layers that are left out: a config.json may count
    layers that the files lack.
    """
    count = config.model.mtp_num_layers
    if count is None or count == shape.mtp_num_layers:
        return shape, shape
    origin = "the model's config.json" if weights is None else str(weights.path)
    fewer = fewer_predictions(shape, count, origin)
    if resume is not None:
        raise UserError(f"--mtp-num-layers: {count} changes the model that is resumed; try: --finetune to start anew")
    return fewer, fewer if weights is None or weights.format == "hf" else shape


def _family_of_options(config: RunConfig) -> str:
    """The tables for a shape from flags when --model-type-hf does not name them."""
    m = config.model
    if m.multi_latent_attention:
        return "deepseek"
    if config.experts.num_experts is not None:
        return "qwen_moe"
    return "qwen" if m.add_qkv_bias or m.qk_layernorm else "llama"


def _base_of(adapter: Found) -> Found:
    base = (adapter.record.get("base") or {}).get("path")
    source = find_source(base) if base else None
    if source is None:
        raise UserError(
            f"lora: {adapter.path} holds adapters and its base model ({base or 'not recorded'}) is not there; "
            "try: --load BASE --lora-load " + str(adapter.path)
        )
    return source


def _shape(config: RunConfig, weights: Found | None, problems: list[str], tokenizer_size: int | None):
    """(shape, directory with config.json and tokenizer files)."""
    m = config.model
    ignore = m.ignore_config_field or ()
    if weights is not None and weights.format == "hf":
        shape = shape_from_hf(read_hf_config(weights.directory), ignore)
        problems += contradictions(config, shape, str(weights.path / "config.json"))
        return shape, weights.directory
    if weights is not None and weights.record.get("shape"):
        shape = ModelShape.from_json(weights.record["shape"])
        problems += contradictions(config, shape, f"the record in {weights.directory}")
        files = weights.directory / "hf"
        return shape, files if files.is_dir() else None
    if m.hf_config is not None:
        shape = shape_from_hf(read_hf_config(m.hf_config), ignore)
        problems += contradictions(config, shape, m.hf_config)
        path = Path(m.hf_config)
        return shape, path if path.is_dir() else path.parent
    if weights is not None and not m.num_layers:
        raise UserError(f"config: {weights.path} records no architecture; try: --hf-config DIR with its config.json")
    if config.door == "inference" and weights is None:
        raise UserError("--load is missing: there is no model to answer with")
    named = m.model_type_hf or _family_of_options(config)
    if m.vocab_size is None and tokenizer_size is None:
        problems.append("--vocab-size is missing: the shape comes from flags and there is no tokenizer to ask")
    shape, missing = shape_from_options(config, UPSTREAM_FAMILIES.get(named, named), tokenizer_size or 0)
    problems += missing
    return shape, None


def _adapters(config: RunConfig, source: Found | None, problems: list[str]) -> AdapterSettings | None:
    return adapters_asked_for(config) if source is None else recorded_adapters(config, source, problems)


def recorded_adapters(config: RunConfig, source: Found, problems: list[str]) -> AdapterSettings:
    """Settings inside an adapter checkpoint; options that contradict them become problems.

    Raises:
        UserError: an unknown target, or a PEFT feature that is not implemented.
    """
    asked = adapters_asked_for(config)
    if source.format == "peft":
        recorded = read_peft_settings(source.directory)
    else:
        recorded = AdapterSettings.from_json(source.record["adapters"])
    checks = {"lora_r": recorded.rank, "lora_alpha": recorded.alpha, "lora_target_modules": dict(recorded.targets)}
    for name, value in checks.items():
        if name not in config.given:
            continue
        said = dict(asked.targets) if name == "lora_target_modules" else config.get(name)
        if said != value:
            flag = all_options()[name].flags[0]
            problems.append(f"{flag}: {said} contradicts the adapters in {source.path} ({value}); leave the flag out")
    if "lora_dropout" in config.given:
        return dataclasses.replace(recorded, dropout=config.lora.lora_dropout)
    return recorded


def _notes(config: RunConfig) -> list[str]:
    """Options that are accepted without effect, each with the reason."""
    p, t = config.parallel, config.training
    notes = []
    if p.sequence_parallel and p.tensor_model_parallel_size == 1:
        notes.append("--sequence-parallel has no effect with tensor parallel 1: there is nothing to split")
    if p.context_parallel_size == 1:
        for name in ("context_parallel_algo", "ulysses_degree_in_cp", "cp_window_size"):
            if name in config.given:
                flag = all_options()[name].flags[0]
                notes.append(f"{flag} has no effect with context parallel 1: no sequence is shared")
    if config.door == "posttrain" and t.reset_attention_mask:
        notes.append("--reset-attention-mask has no effect in SFT: documents of one row never see each other")
    if config.door == "pretrain" and t.pad_to_multiple_of and not t.reset_attention_mask:
        notes.append(
            "--pad-to-multiple-of has no effect in pre-training without --reset-attention-mask: every row has "
            "--seq-length tokens"
        )
    return notes


def _layout(config: RunConfig, shape: ModelShape) -> ParallelLayout:
    """The layout that the options describe for a model of this shape.

    Raises:
        UserError: the layers do not divide.
    """
    p = config.parallel
    cp = p.context_parallel_size
    exchanging = {"megatron_cp_algo": 1, "ulysses_cp_algo": cp, "hybrid_cp_algo": p.ulysses_degree_in_cp or 1}
    return ParallelLayout(
        layers=layers_of_options(p, shape.num_layers, p.pipeline_model_parallel_size),
        world_size=config.logging.world_size or int(os.environ.get("WORLD_SIZE", "1")),
        tp=p.tensor_model_parallel_size,
        cp=cp,
        ep=p.expert_model_parallel_size,
        etp=p.expert_tensor_parallel_size,
        ulysses=exchanging[p.context_parallel_algo] if cp > 1 else 1,
        ring_window=p.cp_window_size if cp > 1 else 1,
    )


def _assemble(config, layout, shape, stored_shape, weights, adapter_source, resume, adapters, hf_files) -> Plan:
    p, t = config.parallel, config.training
    tp, data_parallel = layout.tp, layout.dp
    global_batch = t.global_batch_size or t.micro_batch_size * data_parallel
    seq_length = config.data.seq_length or min(shape.max_position_embeddings, LONGEST_DEFAULT_SEQUENCE)
    rules = layout_rules(shape, layout)
    if config.door != "inference":
        dropout = config.model.attention_dropout
        dropout = shape.attention_dropout if dropout is None else dropout
        rules += context_rules(shape, layout, attention_dropout=dropout)
        rules += batch_rules(t.micro_batch_size, global_batch, data_parallel)
        rules += interleaving_rules(t.micro_batch_size, global_batch, layout)
        rules += sequence_rules(
            shape,
            seq_length=seq_length,
            tp=tp,
            sequence_parallel=p.sequence_parallel,
            padded=config.door == "pretrain" or t.pad_to_seq_length,
        )
    padded = padded_vocab_size(shape.vocab_size, tp, config.model.make_vocab_size_divisible_by)
    return Plan(
        config=config,
        shape=shape,
        stored_shape=stored_shape,
        weights=weights,
        adapters=adapters,
        adapter_source=adapter_source,
        resume=resume,
        hf_files=hf_files,
        tokenizer=config.tokenizer.tokenizer_name_or_path
        or config.tokenizer.tokenizer_model
        or (str(hf_files) if hf_files else None),
        layout=layout,
        global_batch_size=global_batch,
        seq_length=seq_length,
        padded_vocab_size=padded,
        rules=rules,
        notes=_notes(config),
    )
