"""What a run loads, and the architecture of it: checkpoint, adapters, config.json or flags."""

from __future__ import annotations

from pathlib import Path

from mindspeed_llm.checkpoint.detect import Found
from mindspeed_llm.checkpoint.load import fewer_predictions, truncated_shape
from mindspeed_llm.config.run import RunConfig
from mindspeed_llm.errors import UserError
from mindspeed_llm.models.hf_config import read_hf_config, shape_from_hf
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.plan.identity import contradictions, shape_from_options
from mindspeed_llm.plan.restart import find_restart
from mindspeed_llm.plan.source import ADAPTER_FORMATS, find_adapters, find_source

# Names that people know from upstream's --model-type-hf.
UPSTREAM_FAMILIES = {
    "llama2": "llama", "llama3": "llama", "llama31": "llama", "codellama": "llama", "mistral": "llama", "yi": "llama",
    "qwen2": "qwen", "qwen25": "qwen", "qwen3": "qwen", "deepseek2": "deepseek", "deepseek2-lite": "deepseek",
    "deepseek3": "deepseek",
    "qwen2-moe": "qwen_moe", "qwen3-moe": "qwen_moe",
}  # fmt: skip


def find_sources(config: RunConfig, problems: list[str]) -> tuple[Found | None, Found | None, Found | None]:
    """(weights, adapters, what is resumed) from --load, --lora-load and --save.

    Args:
        problems: gets a line when --save already holds a checkpoint that is not resumed.

    Raises:
        UserError: nothing loadable where an option points, or adapters without their base model.
    """
    c = config.checkpoint
    restart = find_restart(config)
    if restart is not None:
        _forget_first_start(config)
    picks = config.door != "inference" and not c.finetune
    # An evaluation takes the weights alone, so neither data nor settings have to be those of the training.
    going_on = picks and not config.training.eval_only
    adapter_source = restart if restart is not None and restart.format == "adapter" else None
    weights = restart if adapter_source is None else None
    if c.load is not None and weights is None:
        step, healthy = (None, False) if restart is not None else (c.ckpt_step, picks and c.load_healthy)
        weights = find_source(c.load, step, fall_back=picks and restart is None, healthy=healthy)
    if config.lora.lora_load is not None and restart is None and "--lora-load" not in not_there_yet(config):
        first, healthy = config.lora.lora_load[0], picks and c.load_healthy
        adapter_source = find_adapters(first, fall_back=picks, healthy=healthy)
    if c.load is not None and weights is None and "--load" not in not_there_yet(config):
        if not c.allow_random_init:
            found = sorted(p.name for p in Path(c.load).iterdir())[:5] if Path(c.load).is_dir() else None
            absent = "is a file" if Path(c.load).is_file() else "does not exist"
            state = absent if found is None else f"found: {', '.join(found) or 'an empty directory'}"
            raise UserError(
                f"checkpoint: nothing loadable in {c.load} ({state}); "
                "legal: a Hugging Face directory, a Megatron checkpoint, a directory written by --save"
                + _instead_of_weights(config)
            )
    if weights is not None and weights.format in ADAPTER_FORMATS:
        if adapter_source is not None:
            raise UserError("lora: --load holds adapters and so does --lora-load; give the base model with --load")
        adapter_source, weights = weights, _base_of(weights)
    elif adapter_source is not None and weights is None:
        weights = _base_of(adapter_source)
    started = adapter_source if adapter_source is not None else weights
    resume = _resumed(started) if going_on and why_weights_alone(config, started) is None else None
    writes = c.save is not None and not config.training.eval_only
    if writes and (there := find_source(c.save, fall_back=True)) is not None:
        if resume is None or Path(c.save).resolve() != resume.path.resolve():
            flag = "--lora-load" if there.format == "adapter" else "--load"
            problems.append(
                f"checkpoint: --save {c.save} already holds a checkpoint; try: {flag} {c.save} to resume it, "
                "--auto-resume to go on from there whenever the same command is started again, or another directory"
            )
    return weights, adapter_source, resume


def not_there_yet(config: RunConfig) -> dict[str, str]:
    """Flag -> path of what a dry run does without: `--hf-config` describes a model that this machine does not have.

    Adapters are missed only where they would answer: what they are made of would otherwise be part of the plan.
    """
    if not config.logging.dry_run or config.model.hf_config is None:
        return {}
    paths = {"--load": config.checkpoint.load}
    if config.door == "inference":
        paths["--lora-load"] = (config.lora.lora_load or [None])[0]
    return {flag: path for flag, path in paths.items() if path is not None and not Path(path).exists()}


def _instead_of_weights(config: RunConfig) -> str:
    ways = ["--allow-random-init to start from random weights"] if config.door != "inference" else []
    ways += ["--hf-config FILE to plan by its shape"] if config.logging.dry_run else []
    return "; try: " + ", ".join(ways) if ways else ""


def why_weights_alone(config: RunConfig, started: Found | None) -> str | None:
    """Why a checkpoint of a training is not gone on from although nothing forbids it; None where it is, or is none.

    Its optimizer, schedule and place in the data are another training's, so only its weights are of use.
    """
    if config.door == "inference" or started is None or "continuity" not in started.record:
        return None
    trained = "posttrain" if "stage" in started.record["continuity"] else "pretrain"
    if trained != config.door:
        return f"{started.directory} was saved by {trained}: this run starts anew from its weights"
    if started.format == "torch_dist" and (config.lora.lora_r or config.lora.lora_target_modules):
        return f"{started.directory} is a whole model and adapters are asked for: they start anew on its weights"
    return None


def _resumed(started: Found | None) -> Found | None:
    """The checkpoint that a run goes on from: what it loads, if training of ours wrote it.

    Raises:
        UserError: training wrote it without what it takes to go on.
    """
    if started is None or started.format not in ("torch_dist", "adapter") or "resumable" not in started.record:
        return None
    if not started.record["resumable"]:
        raise UserError(
            f"resume: {started.directory} cannot be gone on from, because it was saved with --no-save-optim; "
            "try: --finetune to start anew from its weights"
        )
    return started


def _forget_first_start(config: RunConfig) -> None:
    """What a command line says about its first start is not for the start that goes on from `--save`."""
    for name in ("finetune", "no_load_optim", "no_load_rng"):
        config.set(name, False)


def _base_of(adapter: Found) -> Found:
    base = (adapter.record.get("base") or {}).get("path")
    source = find_source(base) if base else None
    if source is None:
        raise UserError(
            f"lora: {adapter.path} holds adapters and its base model ({base or 'not recorded'}) is not there; "
            "try: --load BASE --lora-load " + str(adapter.path)
        )
    return source


def stored_shape_of(
    config: RunConfig, weights: Found | None, problems: list[str], tokenizer_size: int | None
) -> tuple[ModelShape, Path | None]:
    """(shape, directory with config.json and tokenizer files) from the weights, --hf-config or flags alone.

    Args:
        problems: gets a line for each option that contradicts what is recorded, or that is missing.
        tokenizer_size: tokens of the tokenizer, for a shape from flags alone.

    Raises:
        UserError: nothing describes the architecture, or config.json is refused.
    """
    m = config.model
    ignore = m.ignore_config_field or ()
    if weights is not None and weights.format == "hf":
        shape = shape_from_hf(read_hf_config(weights.directory), ignore)
        problems += contradictions(config, shape, str(weights.path / "config.json"))
        problems += _other_config(config, shape, str(weights.path / "config.json"))
        return shape, weights.directory
    if weights is not None and weights.record.get("shape"):
        shape = ModelShape.from_json(weights.record["shape"])
        problems += contradictions(config, shape, f"the record in {weights.directory}")
        problems += _other_config(config, shape, f"the record in {weights.directory}")
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


def _other_config(config: RunConfig, shape: ModelShape, source: str) -> list[str]:
    """A line where `--hf-config` describes another model than `source`, which is what the weights are of.

    Raises:
        UserError: the file is not there, or is refused.
    """
    m = config.model
    if m.hf_config is None:
        return []
    described = shape_from_hf(read_hf_config(m.hf_config), m.ignore_config_field or ())
    if m.truncate_layers == shape.num_layers < described.num_layers:  # the record of a run that truncated
        described = truncated_shape(described, shape.num_layers)
    said, true = described.to_json(), shape.to_json()
    if m.mtp_num_layers is not None:  # decides by itself, whatever either says
        said["mtp_num_layers"] = true["mtp_num_layers"]
    other = [f"{name} {said[name]} (there {true[name]})" for name in true if said[name] != true[name]]
    if not other:
        return []
    return [
        f"--hf-config: {m.hf_config} contradicts {source}, because it says {', '.join(other)}; legal: a config.json of "
        "the same model; try: leave the flag out, since what --load names describes itself"
    ]


def _family_of_options(config: RunConfig) -> str:
    """The tables for a shape from flags when --model-type-hf does not name them."""
    m = config.model
    if m.multi_latent_attention:
        return "deepseek"
    if config.experts.num_experts is not None:
        return "qwen_moe"
    return "qwen" if m.add_qkv_bias or m.qk_layernorm else "llama"


def without_predictions(
    config: RunConfig, shape: ModelShape, weights: Found | None, resume: Found | None
) -> tuple[ModelShape, ModelShape]:
    """(shape of the model, shape of what is stored) after --mtp-num-layers.

    A Hugging Face directory is opened as if it did not have the layers that are left out: a config.json may count
    layers that the files lack.

    Raises:
        UserError: the model has fewer such layers, or it is resumed with another number of them.
    """
    count = config.model.mtp_num_layers
    if count is None or count == shape.mtp_num_layers:
        return shape, shape
    origin = "the model's config.json" if weights is None else str(weights.path)
    fewer = fewer_predictions(shape, count, origin)
    if resume is not None:
        raise UserError(f"--mtp-num-layers: {count} changes the model that is resumed; try: --finetune to start anew")
    return fewer, fewer if weights is None or weights.format == "hf" else shape
