"""PEFT's adapter directories: adapter_config.json and adapter_model.safetensors, through the names of Hugging Face."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mindspeed_llm.errors import UserError
from mindspeed_llm.lora.tensors import AdapterTensors, PartAdapter, check_sizes
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.plan.adaptable import adaptable_linears
from mindspeed_llm.plan.adapters import AdapterSettings
from mindspeed_llm.plan.peft_settings import CONFIG, peft_record, read_peft_settings

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
# (path of the linear, which factor); older versions wrote the name of the adapter too.
FACTOR = r"(.*)\.lora_(?:([AB])(?:\.default)?\.weight|(magnitude_vector)(?:\.default)?(?:\.weight)?)"


def hf_linears(shape: ModelShape) -> dict[tuple[str, str], str]:
    """(path of megatron-core's linear, part) -> path of Hugging Face's, from the family's table of tensors."""
    return {
        (linear.path(layer, expert), part): linear.hf_path(part, layer, expert)
        for linear in adaptable_linears(shape)
        for layer, expert in linear.places()
        for part in linear.parts
    }


def write_peft(
    directory: Path, adapters: AdapterTensors, settings: AdapterSettings, shape: ModelShape, base: str | None
) -> None:
    """Write a directory that `peft.PeftModel.from_pretrained` loads.

    Args:
        base: name or path of the base model, for the record.
    """
    directory.mkdir(parents=True, exist_ok=True)
    paths = hf_linears(shape)
    tensors = {}
    for (path, part), adapter in adapters.items():
        tensors[f"{PREFIX}{paths[path, part]}.lora_A.weight"] = adapter.a.contiguous().clone()
        tensors[f"{PREFIX}{paths[path, part]}.lora_B.weight"] = adapter.b.contiguous().clone()
        if adapter.magnitude is not None:
            tensors[f"{PREFIX}{paths[path, part]}.lora_magnitude_vector"] = adapter.magnitude.contiguous().clone()
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    config = peft_record(settings, shape, base)
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_peft(directory: Path, shape: ModelShape) -> tuple[AdapterTensors, AdapterSettings]:
    """Adapters and settings of a PEFT directory.

    Raises:
        UserError: they are not for this model, or the files are incomplete.
    """
    settings = read_peft_settings(directory, shape)
    if (directory / WEIGHTS).is_file():
        tensors = load_file(directory / WEIGHTS)
    elif (directory / "adapter_model.bin").is_file():
        tensors = torch.load(directory / "adapter_model.bin", weights_only=True)
    else:
        raise UserError(f"lora: {directory} has no {WEIGHTS}; legal: a directory that PEFT saved; try: copy it again")
    linears = {path: place for place, path in hf_linears(shape).items()}
    halves: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(re.escape(PREFIX) + FACTOR, name)
        if match is None or match[1] not in linears:
            raise UserError(f"lora: {name} in {directory} is no adapter of a linear of this model")
        halves.setdefault(linears[match[1]], {})[match[2] or match[3]] = tensor
    if incomplete := [place for place, found in halves.items() if not {"A", "B"} <= set(found)]:
        raise UserError(
            f"lora: {directory} has only one factor of {incomplete[0][0]} {incomplete[0][1]}; legal: lora_A "
            "and lora_B of each; try: copy it again"
        )
    adapters = {
        place: PartAdapter(found["A"], found["B"], found.get("magnitude_vector")) for place, found in halves.items()
    }
    check_sizes(adapters, shape, settings, str(directory))
    return adapters, settings
