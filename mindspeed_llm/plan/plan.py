"""Resolve a configuration against config.json and checkpoint record into one plan; collect every problem on the way."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from mindspeed_llm.checkpoint.detect import Found
from mindspeed_llm.checkpoint.load import truncated_shape
from mindspeed_llm.config.run import RunConfig, all_options
from mindspeed_llm.data.blend import parse_data_path
from mindspeed_llm.data.hf_template import HF
from mindspeed_llm.data.templates import named_template
from mindspeed_llm.errors import UserError
from mindspeed_llm.models.hf_config_writer import hf_config_of
from mindspeed_llm.models.layouts import padded_vocab_size
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.parallel.layer_map import layers_of_options
from mindspeed_llm.parallel.layout import ParallelLayout
from mindspeed_llm.plan.adapters import (
    AdapterSettings,
    adapter_parameters,
    adapters_asked_for,
    check_copied_embedding,
    check_dense,
    check_directions,
    check_tied_embedding,
)
from mindspeed_llm.plan.base import check_base
from mindspeed_llm.plan.combinations import combination_problems
from mindspeed_llm.plan.continuity import continue_run, unknown_changes
from mindspeed_llm.plan.experts import expert_problems
from mindspeed_llm.plan.memory import count_parameters
from mindspeed_llm.plan.quantization import quantization_rules, quantized_base
from mindspeed_llm.plan.recompute import recompute_problems
from mindspeed_llm.plan.recorded_adapters import recorded_adapters, settings_in
from mindspeed_llm.plan.rules import Rule, batch_rules, context_rules, interleaving_rules, layout_rules, sequence_rules
from mindspeed_llm.plan.running import run_problems
from mindspeed_llm.plan.source import find_adapters
from mindspeed_llm.plan.trained import TrainedParts
from mindspeed_llm.plan.weights import (
    find_sources,
    not_there_yet,
    stored_shape_of,
    why_weights_alone,
    without_predictions,
)

LONGEST_DEFAULT_SEQUENCE = 4096


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
        quantized: the frozen base of the adapters is in NF4.
        further_adapters: sets that answer together with the first one.
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
    quantized: bool = False
    further_adapters: list[tuple[Found, AdapterSettings]] = field(default_factory=list)
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
    def holds_nf4(self) -> bool:
        """Whether the model's linears hold NF4; merged ones cannot."""
        return self.quantized and not self.config.lora.lora_merge

    @property
    def num_micro_batches(self) -> int:
        """Forward passes per optimizer step and data-parallel rank."""
        return self.global_batch_size // (self.config.training.micro_batch_size * self.data_parallel_size)

    @property
    def dtype_name(self) -> str:
        """Storage type of weights and activations: "bf16", "fp16" or "fp32"."""
        return "bf16" if self.config.runtime.bf16 else "fp16" if self.config.runtime.fp16 else "fp32"

    @property
    def trained(self) -> TrainedParts:
        """What is trained of the model itself."""
        return TrainedParts.of(self.config.training, self.shape.num_layers, adapted=self.adapters is not None)

    def trainable_parameters(self) -> int:
        """Trained parameters of the model and of adapters."""
        model = (
            self.shape.num_parameters()
            if self.trained.everything
            else count_parameters(self.shape, self.trained.has_tensor)
        )
        return model + (0 if self.adapters is None else adapter_parameters(self.shape, self.adapters))


def resolve(config: RunConfig, problems: list[str], tokenizer_size: int | None = None) -> Plan:
    """The plan of a training or inference door.

    Args:
        problems: lines already found while parsing; everything found here is raised together with them.
        tokenizer_size: tokens of the tokenizer, needed when the shape comes from flags alone.

    Raises:
        UserError: all problems, a line each.
    """
    problems = list(problems)
    problems += unknown_changes(config)
    sources = _try(problems, lambda: find_sources(config, problems), None)
    if sources is None:
        # Without its checkpoint nothing more can be said about the model, only about what was asked of it.
        raise UserError("\n".join([*problems, *combination_problems(config)]))
    weights, adapter_source, resume = sources
    changed, overridden = continue_run(config, resume.record) if resume is not None else ([], [])
    evaluated = adapter_source or weights
    if config.training.eval_only and evaluated is not None and "continuity" in evaluated.record:
        continue_run(config, evaluated.record)  # what was not given is as in training; the rest may differ
    problems += changed + combination_problems(config)
    _try(problems, lambda: parse_data_path(config.data.data_path or ()), None)
    if "prompt_type" in config.given and config.data.prompt_type != HF:
        _try(problems, lambda: named_template(config.data.prompt_type, config.data.prompt_type_path), None)
    shape, hf_files = _try(problems, lambda: stored_shape_of(config, weights, problems, tokenizer_size), (None, None))
    if shape is None:
        raise UserError("\n".join(problems))
    shape, stored_shape = _try(problems, lambda: without_predictions(config, shape, weights, resume), (shape, shape))
    if adapter_source is not None and weights is not None:
        _try(problems, lambda: check_base(adapter_source, weights, stored_shape), None)
    if config.model.truncate_layers is not None:
        shape = _try(problems, lambda: truncated_shape(shape, config.model.truncate_layers), shape)
    adapters = _try(problems, lambda: _adapters(config, adapter_source, shape, problems), None)
    layout = _try(problems, lambda: _layout(config, shape), None)
    if layout is None:
        raise UserError("\n".join(problems))
    plan = _assemble(config, layout, shape, stored_shape, weights, adapter_source, resume, adapters, hf_files)
    plan.notes += overridden
    absent = not_there_yet(config).items()
    plan.notes += [f"{flag} {path} is not there yet: the plan is made without it" for flag, path in absent]
    if not config.checkpoint.finetune and (why := why_weights_alone(config, adapter_source or weights)):
        plan.notes.append(why)
    if _try(problems, lambda: plan.trained, None) is None:
        raise UserError("\n".join(problems))
    if plan.trained.selects:
        _try(problems, lambda: plan.trained.check(shape), None)
    if config.lora.lora_load is not None and adapter_source is not None:
        for path in config.lora.lora_load[1:]:
            one = _try(problems, lambda: _further_adapters(path, weights, shape, stored_shape), None)  # noqa: B023
            plan.further_adapters += [] if one is None else [one]
    plan.quantized = quantized_base(config, weights, adapter_source, adapters is not None, problems)
    if plan.holds_nf4:
        plan.rules += quantization_rules(shape, layout)
    if adapters is not None:
        _try(problems, lambda: check_tied_embedding(shape, adapters), None)
        _try(problems, lambda: check_copied_embedding(shape, adapters, layout), None)
        if config.lora.lora_fusion_combine:
            _try(problems, lambda: check_dense(adapters, "--lora-fusion-combine"), None)
        if config.lora.lora_prepack:
            _try(problems, lambda: check_dense(adapters, "--lora-prepack"), None)
        if config.lora.lora_kernels != "torch":
            _try(problems, lambda: check_dense(adapters, f"--lora-kernels {config.lora.lora_kernels}"), None)
        if adapters.use_dora:
            _try(problems, lambda: check_directions(shape, adapters, plan.trained), None)
    problems += run_problems(
        config,
        global_batch_size=plan.global_batch_size,
        world_size=layout.world_size,
        adapted=adapters is not None,
    )
    problems += _export_problems(plan)
    problems += expert_problems(config, shape, layout)
    problems += recompute_problems(config, shape)
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


def _adapters(
    config: RunConfig, source: Found | None, shape: ModelShape, problems: list[str]
) -> AdapterSettings | None:
    if source is None:
        return adapters_asked_for(config, shape)
    return recorded_adapters(config, source, shape, problems)


def _export_problems(plan: Plan) -> list[str]:
    """Why `--save-hf` could not write what was trained."""
    if not plan.config.checkpoint.save_hf:
        return []
    if plan.adapters is not None and plan.weights is None:
        return ["--save-hf: the base of the adapters is random and nowhere on disk; try: --load"]
    if plan.hf_files is None:
        try:
            hf_config_of(plan.shape)
        except UserError as wrong:
            return [f"--save-hf: {wrong}"]
    return []


def _further_adapters(
    path: str, weights: Found | None, shape: ModelShape, stored_shape: ModelShape
) -> tuple[Found, AdapterSettings]:
    """A set of adapters beside the first one, with its own settings."""
    source = find_adapters(path)
    if weights is not None:
        check_base(source, weights, stored_shape)
    return source, settings_in(source, shape)


def _passed_over(*loaded: Found | None) -> list[str]:
    """Checkpoints that were to be loaded and are damaged."""
    return [
        f"checkpoint: passed over {line}; loading {found.directory}"
        for found in loaded
        if found is not None
        for line in found.skipped
    ]


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
            chunks=config.operators.coc_parallel_num,
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
        notes=[*_passed_over(weights, adapter_source), *_notes(config)],
    )
