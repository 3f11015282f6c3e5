"""PEFT's adapter directories: adapter_config.json and adapter_model.safetensors, through the names of Hugging Face.

Experts have two forms there: those of transformers 4, a linear for each (`...experts.5.gate_proj`), which are read; and
those of transformers 5, where one parameter stacks all experts of a layer (`lora.peft_experts`), which are written and
read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from mindspeed_llm.errors import UserError
from mindspeed_llm.lora.peft_experts import read_stacked, write_stacked
from mindspeed_llm.lora.tensors import AdapterTensors, PartAdapter, adapted_places, check_sizes
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.plan.adaptable import adaptable_linears, module_of, renamed
from mindspeed_llm.plan.adapters import AdapterSettings
from mindspeed_llm.plan.peft_settings import BASE, CONFIG, WEIGHTS, adapter_file, peft_record, read_peft_settings

PREFIX = "base_model.model."
# PEFT saves the matrices of embeddings beside their adapters; `plan.base` compares them with the base.
SAVED_BASE = ".base_layer.weight"
VOCABULARY = ("word_embeddings", "output_layer")
# (path of the linear, which factor); older versions wrote the name of the adapter too, and an embedding has its own.
FACTOR = (
    r"(.*)\.lora_(?:([AB])(?:\.default)?\.weight|embedding_([AB])(?:\.default)?"
    r"|(magnitude_vector)(?:\.default)?(?:\.weight)?)"
)


def hf_linears(shape: ModelShape) -> dict[tuple[str, str], str]:
    """(path of megatron-core's linear, part) -> path of Hugging Face's, from the family's table of tensors."""
    return {
        (linear.path(layer, expert), part): linear.hf_path(part, layer, expert)
        for linear in adaptable_linears(shape)
        for layer, expert in linear.places()
        for part in linear.parts
    }


def write_peft(
    directory: Path,
    adapters: AdapterTensors,
    settings: AdapterSettings,
    shape: ModelShape,
    base: str | None,
    base_record: Mapping[str, Any] | None = None,
) -> None:
    """Write a directory that `peft.PeftModel.from_pretrained` loads.

    Args:
        base: name or path of the base model, for the record.
        base_record: what our own checkpoint says about the base (its fingerprint), kept beside the tensors.

    Raises:
        UserError: PEFT, or the model's class in transformers, has no such adapters.
    """
    config = peft_record(settings, shape, base)
    tensors: dict[str, Tensor] = {}
    for place in adapted_places(shape, settings):
        if place.layer >= shape.num_layers:
            raise UserError(
                f"lora: {place.path} has an adapter, and transformers' class of the model has no such layer; legal: a "
                "merged model; try: --save-model-type hf without --save-lora-to-hf"
            )
        if place.linear.experts:
            continue
        for part in place.parts:
            path = PREFIX + renamed(place.linear.hf_path(part, place.layer))
            adapter, kind = adapters[place.path, part], "lora_{}.weight"
            if place.linear.module == "word_embeddings":
                kind = "lora_embedding_{}"
            tensors[f"{path}.{kind.format('A')}"], tensors[f"{path}.{kind.format('B')}"] = adapter.a, adapter.b
            if adapter.magnitude is not None:
                tensors[f"{path}.lora_magnitude_vector"] = adapter.magnitude
    tensors |= {PREFIX + name: tensor for name, tensor in write_stacked(adapters, settings, shape).items()}
    directory.mkdir(parents=True, exist_ok=True)
    about = {"format": "pt"} | ({} if base_record is None else {BASE: json.dumps(base_record)})
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, directory / WEIGHTS, about)
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def is_saved_embedding(name: str, linears: Mapping[str, tuple[str, str]]) -> bool:
    """Whether a tensor is the matrix of an embedding or output layer itself.

    Args:
        linears: path of Hugging Face's linear -> (path of megatron-core's, part).
    """
    path, _ = linears.get(name.removesuffix(SAVED_BASE), ("", ""))
    return name.endswith(SAVED_BASE) and module_of(path) in VOCABULARY


def read_peft(directory: Path, shape: ModelShape) -> tuple[AdapterTensors, AdapterSettings]:
    """Adapters and settings of a PEFT directory.

    Raises:
        UserError: they are not for this model, or the files are incomplete.
    """
    settings = read_peft_settings(directory, shape)
    with adapter_file(directory) as (names, read_tensor):
        tensors = {name: read_tensor(name) for name in names}
    linears = {spelled: place for place, path in hf_linears(shape).items() for spelled in (path, renamed(path))}
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    adapters, read = read_stacked(tensors, settings, shape, str(directory))
    halves: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name in read or is_saved_embedding(name, linears):
            continue
        match = re.fullmatch(FACTOR, name)
        if match is None or match[1] not in linears:
            raise UserError(f"lora: {name} in {directory} is no adapter of a linear of this model")
        halves.setdefault(linears[match[1]], {})[match[2] or match[3] or match[4]] = tensor
    if incomplete := [place for place, found in halves.items() if not {"A", "B"} <= set(found)]:
        raise UserError(
            f"lora: {directory} has only one factor of {incomplete[0][0]} {incomplete[0][1]}; legal: lora_A "
            "and lora_B of each; try: copy it again"
        )
    adapters |= {
        place: PartAdapter(found["A"], found["B"], found.get("magnitude_vector")) for place, found in halves.items()
    }
    check_sizes(adapters, shape, settings, str(directory))
    return adapters, settings
