"""The training doors: plan, data before process groups, dry run, training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mindspeed_llm import accelerator
from mindspeed_llm.cli.door import say_notes
from mindspeed_llm.cli.hub import download_models
from mindspeed_llm.cli.places import unwritable_places
from mindspeed_llm.config.parser import Parsed
from mindspeed_llm.config.run import RunConfig
from mindspeed_llm.data.blend import parse_data_path
from mindspeed_llm.data.cache import is_preprocessed, preprocess_cached
from mindspeed_llm.data.record import check_settings, check_tokenizer, find_dataset
from mindspeed_llm.data.tokenizer import Tokenizer, load_tokenizer
from mindspeed_llm.errors import UserError
from mindspeed_llm.plan.plan import Plan, resolve

if TYPE_CHECKING:
    from mindspeed_llm.training.run import RunResult


# Rows of a model whose tokenizer has no chat template and whose user names none.
FALLBACK_TEMPLATE = "default"


def run_door(parsed: Parsed) -> RunResult | None:
    """Do what the command line of a training door says; None after a dry run."""
    config = parsed.config
    problems = list(parsed.problems)
    resumes = config.checkpoint.load is not None or config.lora.lora_load is not None
    if not config.data.data_path and not config.logging.dry_run and not resumes:
        problems.append("--data-path is missing: preprocessed files or raw data to train on")
    problems += _not_possible_here(config)
    download_models(config, problems)
    plan = resolve(config, problems, tokenizer_size=_size_of_named_tokenizer(parsed))
    say_notes([*parsed.notes, *plan.notes])
    config.data.seq_length = plan.seq_length
    if config.logging.dry_run:
        _dry_run(plan)
        return None
    if not config.data.data_path:
        raise UserError("--data-path is missing: preprocessed files or raw data to train on")
    tokenizer = tokenizer_of(plan)
    prefixes = prepare_data(plan, tokenizer)
    if config.logging.show_samples:
        _show_samples(plan, prefixes, tokenizer)
    accelerator.show_to_megatron(plan.config.runtime.device)
    from mindspeed_llm.training.run import run_training

    result = run_training(plan, prefixes, _padding_token(tokenizer))
    if config.checkpoint.save_hf and not config.checkpoint.save_hf_each_checkpoint and not result.stopped:
        import torch.distributed as dist

        from mindspeed_llm.training.hf_export import export_as_hf

        if not dist.is_initialized() or dist.get_rank() == 0:
            export_as_hf(plan)
    return result


def _not_possible_here(config: RunConfig) -> list[str]:
    """What this machine lacks for the job, a line each: found out before anything is started, and by a dry run too."""
    problems = []
    device = config.runtime.device
    if device != "auto":
        try:
            accelerator.available(device, "device")
        except UserError as wrong:
            problems.append(str(wrong))
    return problems + unwritable_places(config, without=("save",) if config.training.eval_only else ())


def _dry_run(plan: Plan) -> None:
    from mindspeed_llm.plan.show import show_plan

    show_plan(plan)
    rank = plan.config.logging.check_rank
    if rank is not None:
        accelerator.show_to_megatron(plan.config.runtime.device)
        from mindspeed_llm.training.check_rank import check_rank

        print(f" {check_rank(plan, rank)}")


def tokenizer_of(plan: Plan) -> Tokenizer | None:
    """The plan's tokenizer, checked against the vocabulary; None when none is known."""
    if plan.tokenizer is None:
        return None
    t = plan.config.tokenizer
    tokenizer = load_tokenizer(
        plan.tokenizer, t.tokenizer_type, not t.tokenizer_not_use_fast, trust_remote_code=t.trust_remote_code
    )
    if tokenizer.vocab_size > plan.shape.vocab_size:
        raise UserError(
            f"tokenizer: {plan.tokenizer} has {tokenizer.vocab_size} tokens and the model {plan.shape.vocab_size}; "
            "legal: a tokenizer that fits the model; try: --tokenizer-name-or-path with the model's own directory"
        )
    return tokenizer


def prepare_data(plan: Plan, tokenizer: Tokenizer | None) -> list[str]:
    """Preprocessed prefixes of the sets in `--data-path`, in their order; raw ones are preprocessed into the cache."""
    paths = [source.path for source in parse_data_path(plan.config.data.data_path)]
    if all(map(is_preprocessed, paths)):  # otherwise the options are for those that are raw
        for path in paths:
            check_settings(path, _asked_of_data(plan.config))
    return [_prepared(plan, path, tokenizer) for path in paths]


def _asked_of_data(config: RunConfig) -> dict[str, Any]:
    """The options of preprocessing that the user has given."""
    names = ("handler_name", "prompt_type", "append_eod", "map_keys", "enable_thinking", "json_keys", "max_samples")
    asked = {name: config.get(name) for name in names if name in config.given}
    if config.given.keys() & {"pack", "neat_pack"}:
        asked["pack"] = "neat_pack" if config.data.neat_pack else "pack" if config.data.pack else "none"
    return asked


def _prepared(plan: Plan, path: str, tokenizer: Tokenizer | None) -> str:
    """One set's prefix; raw data are preprocessed once, before process groups exist."""
    if is_preprocessed(path):
        if find_dataset(path) is None:
            say_notes([f"{path} has no record: taken as another program's files, their tokenizer is not checked"])
        elif tokenizer is not None:
            check_tokenizer(path, tokenizer)
        return path
    if tokenizer is None:
        raise UserError(f"--tokenizer-name-or-path is missing: {path} is raw data and there is no tokenizer for it")
    if plan.config.door == "posttrain" and plan.config.data.prompt_type is None:
        plan.config.data.prompt_type = "hf" if tokenizer.chat_template else FALLBACK_TEMPLATE
        whose = "the tokenizer's own" if tokenizer.chat_template else "the tokenizer has none of its own"
        say_notes([f"--prompt-type is not given: using {plan.config.data.prompt_type} ({whose})"])
    stage = "sft" if plan.config.door == "posttrain" else "pretrain"
    return preprocess_cached(replace(plan.config.data, data_path=[path]), tokenizer, stage=stage)


def _size_of_named_tokenizer(parsed: Parsed) -> int | None:
    """Size of a tokenizer named on the command line, for a shape that comes from flags alone."""
    t, m = parsed.config.tokenizer, parsed.config.model
    name = t.tokenizer_name_or_path or t.tokenizer_model
    if name is None or m.vocab_size is not None or m.hf_config is not None or not m.num_layers:
        return None
    try:
        return load_tokenizer(name, t.tokenizer_type, not t.tokenizer_not_use_fast).vocab_size
    except UserError as wrong:
        parsed.problems.append(str(wrong))
        return None


def _padding_token(tokenizer: Tokenizer | None) -> int:
    """Any id will do where nothing is trained and nothing looks; the tokenizer's own pad or eos reads best."""
    if tokenizer is None:
        return 0
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    return tokenizer.eos_token_id or 0


def _show_samples(plan: Plan, prefixes: Sequence[str], tokenizer: Tokenizer | None) -> None:
    import os

    from mindspeed_llm.data.show import show

    if int(os.environ.get("RANK", "0")) == 0:
        for prefix in prefixes:
            show(prefix, tokenizer, plan.config.logging.show_samples)
