"""`convert_ckpt.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspeed_llm.cli.door import open_door, say_notes
from mindspeed_llm.cli.places import unwritable_places
from mindspeed_llm.config.lora import weight_problems
from mindspeed_llm.config.parser import Parsed
from mindspeed_llm.config.run import RunConfig
from mindspeed_llm.errors import UserError

if TYPE_CHECKING:
    from mindspeed_llm.checkpoint.detect import Found
    from mindspeed_llm.models.shape import ModelShape
    from mindspeed_llm.plan.adapters import AdapterSettings

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
    from mindspeed_llm.checkpoint.convert import convert
    from mindspeed_llm.checkpoint.detect import detect

    found = detect(_local(c.load_dir, config))
    if c.save_lora_to_hf:
        _export_adapters(config, found)
        return
    layout = _layout(config, found)
    if c.save_model_type == "hf":
        _check_repeats_source(config, found, layout)
        layout = {}
    convert(
        found.path,
        c.save_dir,
        c.load_model_type,
        c.save_model_type,
        **layout,
        dtype=c.params_dtype,
        hf_cfg_dir=c.hf_cfg_dir,
        **_merge(config, found),
        quantize=c.qlora_nf4,
        ignore_fields=config.model.ignore_config_field or (),
        mtp_num_layers=config.model.mtp_num_layers,
    )


def _problems(config: RunConfig) -> list[str]:
    c, lora = config.convert, config.lora
    problems = [f"{flag} is missing" for flag, v in (("--load-dir", c.load_dir), ("--save-dir", c.save_dir)) if not v]
    if c.save_lora_to_hf and not lora.lora_load:
        problems.append("--save-lora-to-hf needs --lora-load with the adapters to export")
    problems += unwritable_places(config)
    problems += weight_problems(lora)
    if not lora.lora_load and "qlora_merge_base" in config.given:
        problems.append("--qlora-merge-base has no meaning without --lora-load")
    if c.qlora_nf4 and c.save_lora_to_hf:
        problems.append("--qlora-nf4 has no meaning with --save-lora-to-hf, which writes adapters alone")
    if not lora.lora_load and any(n in config.given for n in ("lora_r", "lora_alpha", "lora_target_modules")):
        problems.append("--lora-r, --lora-alpha and --lora-target-modules have no meaning without --lora-load")
    return problems


def _local(name: str, config: RunConfig) -> Path:
    from mindspeed_llm.checkpoint.hub import resolve_model

    return resolve_model(name, config.checkpoint.hub)


def _base_shape(config: RunConfig, found: Found) -> ModelShape:
    """Architecture of --load-dir: its own record, else the config.json that the conversion will take."""
    from mindspeed_llm.checkpoint.detect import shape_of
    from mindspeed_llm.models.hf_config import read_hf_config, shape_from_hf

    c, ignore = config.convert, config.model.ignore_config_field or ()
    foreign = found.format != "hf" and not found.record.get("shape")
    original = c.save_model_type == "hf" and not c.save_lora_to_hf and (Path(c.save_dir) / "config.json").is_file()
    directory = c.hf_cfg_dir or (c.save_dir if original else None)
    if foreign and directory is not None:
        return shape_from_hf(read_hf_config(directory), ignore)
    return shape_of(found, ignore)


def _layout(config: RunConfig, found: Found) -> dict[str, Any]:
    """The layout that the options describe, as `convert` takes it."""
    from mindspeed_llm.checkpoint.expert_files import ExpertLayout
    from mindspeed_llm.parallel.layer_map import split_of_options

    tp, pp = config.convert.target_tensor_parallel_size, config.convert.target_pipeline_parallel_size
    shape = _base_shape(config, found)
    layout = {"tp": tp, "pp": pp, **split_of_options(config.parallel, shape.num_layers, pp)}
    experts = ExpertLayout(
        config.convert.target_expert_parallel_size,
        config.parallel.expert_tensor_parallel_size,
        config.experts.moe_grouped_gemm,
    )
    if experts != ExpertLayout() and shape.num_moe_experts is None:
        raise UserError(
            "convert: --target-expert-parallel-size, --expert-tensor-parallel-size and --moe-grouped-gemm have no "
            "meaning for a model without experts; try: leave them out"
        )
    return {**layout, "experts": experts} if shape.num_moe_experts is not None else layout


def _check_repeats_source(config: RunConfig, found: Found, layout: dict[str, Any]) -> None:
    """A Hugging Face directory has no layout; upstream's options then repeat 1 x 1 or the layout that is read.

    Raises:
        UserError: they say something else.
    """
    from mindspeed_llm.checkpoint.megatron import MegatronSource
    from mindspeed_llm.models.tensor_names import layer_index
    from mindspeed_llm.parallel.layer_map import layer_map

    experts = layout.pop("experts", None)
    sizes, shape = (layout["tp"], layout["pp"]), _base_shape(config, found)
    split = any(layout[name] for name in layout if name not in ("tp", "pp"))
    expert_parallel = experts.ep if experts is not None else 1
    if sizes == (1, 1) and not split and expert_parallel == 1:
        return
    if found.format != "megatron":
        raise UserError(
            f"convert: a layout (tensor x pipeline = {sizes[0]} x {sizes[1]}{', split' if split else ''}) has no "
            f"meaning from {found.format} to hf, because neither has one; legal: 1 x 1; try: leave it out"
        )
    files = MegatronSource(found.directory, shape).files
    if expert_parallel not in (1, files.ep):
        legal = " or ".join(map(str, sorted({1, files.ep})))
        raise UserError(
            f"convert: --target-expert-parallel-size {expert_parallel} is wrong, because {found.path} has {files.ep} "
            f"and a Hugging Face directory has no layout; legal: {legal}; try: leave it out"
        )
    if sizes not in ((1, 1), (files.tp, files.pp)):
        legal = " or ".join(dict.fromkeys(("1 x 1", f"{files.tp} x {files.pp}")))
        raise UserError(
            f"convert: tensor x pipeline = {sizes[0]} x {sizes[1]} is wrong, because {found.path} has "
            f"{files.tp} x {files.pp} and a Hugging Face directory has no layout; legal: {legal}; try: leave it out"
        )
    chunks = layout["vpp"] or (None if layout["layer_list"] else len(files.model_keys(0, 0)))
    given = {name: value for name, value in layout.items() if name not in ("tp", "pp")}
    layers = layer_map(shape.num_layers, files.pp, **given | {"vpp": chunks})
    for layer in range(shape.num_layers):
        p, v, slot = layers.place(layer)
        name = f"decoder.layers.{layer}.self_attention.linear_proj.weight"
        stage, key, stored, _ = files.places[name]
        if (stage, int(key.removeprefix("model") or 0), layer_index(stored)) != (p, v, slot):
            raise UserError(
                f"convert: the layer split is wrong, because {found.path} keeps layer {layer} in stage {stage} as "
                f"{key}.{stored} and not as slot {slot} of chunk {v} of stage {p}; legal: the split of --load-dir; "
                "try: leave it out"
            )


def _adapter_source(config: RunConfig) -> Found:
    """What --lora-load names (first).

    Raises:
        UserError: it holds no adapters.
    """
    from mindspeed_llm.plan.source import find_adapters

    return find_adapters(config.lora.lora_load[0])


def _adapters(config: RunConfig, found: Found):
    """--lora-load, checked against its base and the options repeating it.

    Returns:
        (adapters, settings, shape of the base, base tensors trained beside the adapters by name)
    """
    from mindspeed_llm.lora.peft_format import read_peft
    from mindspeed_llm.lora.tensors import read_adapters, read_trained_base
    from mindspeed_llm.plan.adapters import check_tied_embedding
    from mindspeed_llm.plan.base import check_base
    from mindspeed_llm.plan.recorded_adapters import recorded_adapters

    source = _adapter_source(config)
    problems: list[str] = []
    shape = _base_shape(config, found)
    settings = recorded_adapters(config, source, shape, problems)
    if problems:
        raise UserError("\n".join(problems))
    check_base(source, found, shape)
    check_tied_embedding(shape, settings)
    if len(config.lora.lora_load) > 1 or config.lora.lora_weights is not None:
        return *_combined(config, source, settings, found, shape), shape, {}
    if source.format == "peft":
        return *read_peft(source.directory, shape), shape, {}
    tensors = read_adapters(source.directory, shape, settings)
    return tensors, settings, shape, read_trained_base(source.directory, shape)


def _combined(config: RunConfig, first: Found, settings: AdapterSettings, found: Found, shape: ModelShape):
    """(adapters, settings) of all sets of --lora-load together, with --lora-weights."""
    from mindspeed_llm.lora.combine import combined_settings, combined_tensors, read_set
    from mindspeed_llm.plan.base import check_base
    from mindspeed_llm.plan.recorded_adapters import settings_in
    from mindspeed_llm.plan.source import find_adapters

    sets = [read_set(first, settings, shape)]
    for path in config.lora.lora_load[1:]:
        source = find_adapters(path)
        check_base(source, found, shape)
        sets.append(read_set(source, settings_in(source, shape), shape))
    together = combined_settings(sets, shape)
    return combined_tensors(sets, config.lora.lora_weights or [1.0] * len(sets), together, shape), together


def _merge(config: RunConfig, found: Found) -> dict[str, Any]:
    """What `convert` takes to merge --lora-load; nothing without it."""
    from mindspeed_llm.lora.merge import count_linears, merging_transform
    from mindspeed_llm.plan.quantization import merge_base

    if not config.lora.lora_load:
        return {}
    tensors, settings, shape, trained = _adapters(config, found)
    base = merge_base(config, _adapter_source(config), found)
    changed, linears = count_linears(tensors, shape)
    print(
        f"merging adapters into {changed} of {linears} linears (rank {settings.rank}, alpha {settings.alpha:g}) in fp32"
        + (f", and {len(trained)} tensors trained beside them" if trained else "")
    )
    if base is not None:
        print(f"the base that they were trained on is in NF4; merging into the {base} one (--qlora-merge-base)")
    return {
        "transform": merging_transform(tensors, settings, shape, trained),
        "dequantized": base == "dequantized",
        "notes": {"merge_base": base} if base is not None else None,
    }


def _export_adapters(config: RunConfig, found: Found) -> None:
    from mindspeed_llm.lora.peft_format import write_peft
    from mindspeed_llm.plan.base import base_in

    target = Path(config.convert.save_dir)
    if target.exists() and any(target.iterdir()):
        raise UserError(f"convert: {target} is not empty; try: another --save-dir")
    tensors, settings, shape, trained = _adapters(config, found)
    if trained:
        raise UserError(
            f"convert: --save-lora-to-hf: {config.lora.lora_load[0]} holds {len(trained)} tensors of the base too "
            f"({next(iter(trained))}, ...), because --trainable trained them, and PEFT's format holds adapters alone; "
            "try: merge with --save-model-type hf"
        )
    record = base_in(_adapter_source(config))
    write_peft(target, tensors, settings, shape, str(found.path), record)
    print(f"wrote adapters of {len(tensors)} linears to {target} in PEFT's format")


def _show(config: RunConfig) -> None:
    """What would be read and written."""
    c = config.convert
    layout = f"tensor {c.target_tensor_parallel_size} x pipeline {c.target_pipeline_parallel_size}"
    print(f"read:   {c.load_dir}" + ("" if Path(c.load_dir).exists() else " (not there yet)"))
    if config.lora.lora_load:
        adapters = " + ".join(config.lora.lora_load)
        print(f"merge:  {adapters}" if not c.save_lora_to_hf else f"export: {adapters}")
    print(f"write:  {c.save_dir} ({c.save_model_type}{', ' + layout if c.save_model_type == 'mg' else ''})")
    print("nothing was written")
