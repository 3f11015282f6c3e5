"""`convert_ckpt.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mindspeed_llm.cli.door import open_door, say_notes
from mindspeed_llm.config.parser import Parsed
from mindspeed_llm.config.run import RunConfig
from mindspeed_llm.errors import UserError

WHAT = "Convert checkpoints between Hugging Face and Megatron, for any parallel layout; merge or export LoRA adapters."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the door; returns the exit status."""
    return open_door("convert", WHAT, argv, run)


def run(parsed: Parsed) -> None:
    """Convert, merge or export as the options say."""
    config = parsed.config
    c = config.convert
    parsed.raise_problems(_problems(config))
    say_notes(parsed.notes)
    if config.logging.dry_run:
        _show(config)
        return
    if c.save_lora_to_hf:
        _export_adapters(config)
        return
    from mindspeed_llm.checkpoint.convert import convert

    load_dir = _local(c.load_dir, config)
    convert(
        load_dir,
        c.save_dir,
        c.load_model_type,
        c.save_model_type,
        tp=c.target_tensor_parallel_size,
        pp=c.target_pipeline_parallel_size,
        vpp=_chunks(config, load_dir),
        layer_list=_numbers(c.num_layer_list),
        noop_layers=_numbers(c.noop_layers),
        dtype=c.params_dtype,
        hf_cfg_dir=c.hf_cfg_dir,
        transform=_merge(config, load_dir) if config.lora.lora_load else None,
        ignore_fields=config.model.ignore_config_field or (),
    )


def _problems(config: RunConfig) -> list[str]:
    c, lora = config.convert, config.lora
    problems = [f"{flag} is missing" for flag, v in (("--load-dir", c.load_dir), ("--save-dir", c.save_dir)) if not v]
    if c.save_lora_to_hf and not lora.lora_load:
        problems.append("--save-lora-to-hf needs --lora-load with the adapters to export")
    if c.save_model_type == "hf":
        given = [n for n in ("num_layer_list", "noop_layers", "num_layers_per_virtual_pipeline_stage") if config.get(n)]
        problems += [f"--{n.replace('_', '-')} has no meaning for --save-model-type hf" for n in given]
    for name in ("num_layer_list", "noop_layers"):
        try:
            _numbers(config.get(name))
        except ValueError:
            problems.append(f"--{name.replace('_', '-')}: {config.get(name)!r} is wrong; legal: numbers like 8,8,7,7")
    if not lora.lora_load and any(n in config.given for n in ("lora_r", "lora_alpha", "lora_target_modules")):
        problems.append("--lora-r, --lora-alpha and --lora-target-modules have no meaning without --lora-load")
    return problems


def _numbers(text: str | None) -> list[int] | None:
    return None if text is None else [int(item) for item in text.split(",")]


def _local(name: str, config: RunConfig) -> Path:
    from mindspeed_llm.checkpoint.hub import resolve_model

    return resolve_model(name, config.checkpoint.hub)


def _chunks(config: RunConfig, load_dir: Path) -> int | None:
    """Model chunks per stage from layers per virtual stage.

    Raises:
        UserError: the layers do not divide.
    """
    per_chunk = config.convert.num_layers_per_virtual_pipeline_stage
    if per_chunk is None:
        return None
    from mindspeed_llm.checkpoint.detect import detect, shape_of

    layers, pp = shape_of(detect(load_dir)).num_layers, config.convert.target_pipeline_parallel_size
    if layers % (pp * per_chunk):
        legal = [str(n) for n in range(1, layers + 1) if layers % (pp * n) == 0]
        raise UserError(
            f"--num-layers-per-virtual-pipeline-stage: {per_chunk} x {pp} stages does not divide {layers} layers; "
            f"legal: {', '.join(legal) or 'none with these stages'}"
        )
    return layers // (pp * per_chunk)


def _adapters(config: RunConfig, load_dir: Path):
    """(tensors, settings, shape of the base) of --lora-load, checked against the options that repeat them."""
    from mindspeed_llm.checkpoint.detect import detect, shape_of
    from mindspeed_llm.lora.peft_format import read_peft
    from mindspeed_llm.lora.tensors import read_adapters
    from mindspeed_llm.plan.adapters import AdapterSettings
    from mindspeed_llm.plan.plan import recorded_adapters
    from mindspeed_llm.plan.source import ADAPTER_FORMATS, find_source

    source = find_source(config.lora.lora_load)
    if source is None or source.format not in ADAPTER_FORMATS:
        raise UserError(f"lora: --lora-load {config.lora.lora_load} holds no adapters of ours or of PEFT")
    problems: list[str] = []
    settings = recorded_adapters(config, source, problems)
    if problems:
        raise UserError("\n".join(problems))
    shape = shape_of(detect(load_dir), config.model.ignore_config_field or ())
    if source.format == "peft":
        tensors, settings = read_peft(source.directory, shape)
    else:
        assert isinstance(settings, AdapterSettings)
        tensors = read_adapters(source.directory, shape, settings)
    return tensors, settings, shape


def _merge(config: RunConfig, load_dir: Path):
    from mindspeed_llm.lora.merge import merging_transform

    tensors, settings, shape = _adapters(config, load_dir)
    changed = len({(layer, part) for layer, part in tensors})
    print(f"merging adapters of {changed} linears (rank {settings.rank}, alpha {settings.alpha:g}) in fp32")
    return merging_transform(tensors, settings, shape)


def _export_adapters(config: RunConfig) -> None:
    from mindspeed_llm.lora.peft_format import write_peft

    load_dir, target = _local(config.convert.load_dir, config), Path(config.convert.save_dir)
    if target.exists() and any(target.iterdir()):
        raise UserError(f"convert: {target} is not empty; try: another --save-dir")
    tensors, settings, shape = _adapters(config, load_dir)
    write_peft(target, tensors, settings, shape, str(load_dir))
    print(f"wrote adapters of {len(tensors)} linears to {target} in PEFT's format")


def _show(config: RunConfig) -> None:
    """What would be read and written."""
    c = config.convert
    layout = f"tensor {c.target_tensor_parallel_size} x pipeline {c.target_pipeline_parallel_size}"
    print(f"read:   {c.load_dir}" + ("" if Path(c.load_dir).exists() else " (not there yet)"))
    if config.lora.lora_load:
        print(f"merge:  {config.lora.lora_load}" if not c.save_lora_to_hf else f"export: {config.lora.lora_load}")
    print(f"write:  {c.save_dir} ({c.save_model_type}{', ' + layout if c.save_model_type == 'mg' else ''})")
    print("nothing was written")
