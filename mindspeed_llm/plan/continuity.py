"""What a continued run takes from its checkpoint, what may not change, and what is said about the rest.

An option that is not given keeps the value it was saved with, so that `--load DIR --save DIR` alone continues a run.
"""

from __future__ import annotations

from typing import Any

from mindspeed_llm.config.run import RunConfig, all_options, door_options

# Sections whose options decide what is computed. Layout, devices, files and logging are each start's own affair.
RECORDED_SECTIONS = ("data", "tokenizer", "model", "experts", "operators", "training", "recompute", "optimizer")
RECORDED_BESIDE = ("bf16", "fp16", "num_threads")  # threads divide sums among them
# About the machine or this start alone; trust in files, which a checkpoint cannot give itself; layers cut off already.
NOT_RECORDED = (
    "cache_dir", "overwrite_cache", "workers", "trust_remote_code", "gradient_accumulation_fusion", "exit_interval",
    "use_ascend_coc", "coc_parallel_num", "use_ascend_mc2",
    "exit_duration_in_mins", "eval_only", "truncate_layers", "ignore_config_field",
)  # fmt: skip
# Options that exclude or complete each other: who gives one decides about all.
TOGETHER = (
    ("train_iters", "train_epochs", "train_samples"),
    ("lr_warmup_fraction", "lr_warmup_iters"),
    ("bf16", "fp16"),
    ("trainable", "freeze", "trainable_layers", "frozen_layers"),
    ("recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules"),
    # Numbers of layers or tokens have no flag that takes them back.
    ("recompute_norm", "recompute_norm_num_layers"),
    ("recompute_activation_function", "recompute_activation_function_num_layers"),
    ("moe_zero_memory", "moe_zero_memory_num_layers"),
    ("cross_entropy_loss_fusion", "loss_compute_mode", "loss_chunk_size"),
    ("padding_free", "pad_to_seq_length"),
    ("pack", "neat_pack"),
    ("tokenizer_name_or_path", "tokenizer_model"),
)
LENGTHS = TOGETHER[0]


def allowed_changes(config: RunConfig) -> set[str]:
    """Names of the options in `--allow-change`, in whatever spelling."""
    return {n.removeprefix("--").rstrip("=").replace("-", "_") for n in config.checkpoint.allow_change or ()}


def is_allowed(config: RunConfig, name: str) -> bool:
    """Whether `--allow-change` names this option."""
    return name in allowed_changes(config)


def unknown_changes(config: RunConfig) -> list[str]:
    """A line if `--allow-change` names something that needs no permission."""
    kept = [o for o in door_options(config.door) if o.kind == "continuity"]
    unknown = sorted(allowed_changes(config) - {o.name for o in kept})
    if not unknown:
        return []
    legal = ", ".join(o.flags[0][2:] for o in kept)
    return [f"--allow-change: {', '.join(unknown)} is wrong, because it is not held fixed on resume; legal: {legal}"]


def recorded_options(config: RunConfig) -> dict[str, Any]:
    """The options that a checkpoint records beside those that may not change, by name."""
    return {
        o.name: config.get(o.name)
        for o in door_options(config.door)
        if o.name in RECORDED_BESIDE or (o.section in RECORDED_SECTIONS and o.name not in NOT_RECORDED)
        if o.kind == "free" or o.section == "tokenizer"
    }


def continue_run(config: RunConfig, record: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Take over the recorded options that were not given, and report the given ones that differ.

    Args:
        record: of the checkpoint that is resumed.

    Returns:
        (a line for each option that changed without `--allow-change`, a line for each other one that differs).
    """
    problems = []
    for name, before in record["continuity"].items():
        if name not in config.given:
            config.set(name, before)
        elif config.get(name) != before and name != "data_path" and not is_allowed(config, name):
            flag = all_options()[name].flags[0]
            problems.append(
                f"resume: {flag} was {before} and is now {config.get(name)}; "
                f"keep it, or --allow-change {flag[2:]} if it is meant"
            )
    return problems, _take_over(config, record.get("options", {}))


def _take_over(config: RunConfig, recorded: dict[str, Any]) -> list[str]:
    """Set what was not given; a line for each given option that overrides what was recorded."""
    known = {o.name for o in door_options(config.door)}
    decided = {name for group in TOGETHER if config.given.keys() & set(group) for name in group}
    notes = []
    for name, before in recorded.items():
        if name not in known:  # of another door, or of another version
            continue
        if name not in config.given and name not in decided:
            config.set(name, before)
        elif config.get(name) != before:
            notes.append(_overridden(config, name, before))
    return notes


def _overridden(config: RunConfig, name: str, before: Any) -> str:
    o = config.optimizer
    note = f"resume: {all_options()[name].flags[0]} was {before} and is now {config.get(name)}"
    if name in LENGTHS and before is not None and o.lr_decay_iters is None and o.lr_decay_style != "constant":
        return f"{note}; the learning rate follows the schedule of the new length (--lr-decay-iters N fixes its end)"
    return note
