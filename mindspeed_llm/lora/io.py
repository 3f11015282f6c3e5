"""Adapters into an injected model, from a checkpoint of ours or of PEFT."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from mindspeed_llm.errors import UserError
from mindspeed_llm.lora.experts import ExpertFactors, LoraExpertsMixin
from mindspeed_llm.lora.inject import adapted_modules
from mindspeed_llm.lora.layers import LoraMixin
from mindspeed_llm.lora.peft_format import read_peft
from mindspeed_llm.lora.tensors import AdapterTensors, read_adapters, read_trained_base
from mindspeed_llm.lora.vocabulary import LoraVocabularyMixin
from mindspeed_llm.models.initialize import global_name
from mindspeed_llm.plan.adapters import AdapterSettings


def load_adapters(model: nn.Module, directory: Path, kind: str, settings: AdapterSettings) -> int:
    """Fill the adapters of an injected model (this rank's part of it).

    Args:
        kind: "adapter" (ours) or "peft".
        settings: those the model was injected with.

    Returns:
        Number of tensors filled.

    Raises:
        UserError: they are not for this model, or base tensors were trained beside them.
    """
    shape = model.config.shape
    if kind == "peft":
        tensors, _ = read_peft(directory, shape)
    else:
        tensors = read_adapters(directory, shape, settings)
        if trained := read_trained_base(directory, shape):
            raise UserError(
                f"lora: {directory} holds {len(trained)} tensors of the base too ({next(iter(trained))}, ...), because "
                "--trainable trained them beside the adapters; legal: resuming that run, or a merged model; try: "
                "convert_ckpt.py --lora-load to merge both"
            )
    return fill_adapters(model, tensors)


def fill_adapters(model: nn.Module, tensors: AdapterTensors) -> int:
    """Copy this rank's slices of all adapters of an injected model; returns the number of tensors."""
    filled = 0
    for path, module in adapted_modules(model).items():
        filled += fill_adapter(module, global_name(path, model.config, model.vp_stage, model.pp_group.rank()), tensors)
    return filled


@torch.no_grad()
def fill_adapter(module: LoraMixin | ExpertFactors, path: str, tensors: AdapterTensors) -> int:
    """Copy this rank's slices of one linear's adapter; returns the number of tensors.

    Args:
        path: of the linear in the whole model.
    """
    if isinstance(module, ExpertFactors | LoraVocabularyMixin):
        return module.fill(path, tensors)
    kind = module.kind
    parts = [tensors[path, part] for part in module.adapter_parts]
    whole_a = parts[0].a if module.shares_a else torch.cat([p.a for p in parts])
    module.lora_A.copy_(whole_a if kind.column else whole_a.chunk(kind.world, dim=1)[kind.group.rank()])
    for name, part in zip(module.adapter_parts, parts):
        module.lora_B[name].copy_(part.b.chunk(kind.world)[kind.group.rank()] if kind.column else part.b)
        if module.uses_dora:
            whole = part.magnitude
            module.lora_magnitude[name].copy_(whole.chunk(kind.world)[kind.group.rank()] if kind.column else whole)
    return 1 + len(parts) * (2 if module.uses_dora else 1)


@torch.no_grad()
def merge_adapters(model: nn.Module) -> int:
    """Add every adapter to its weight (in fp32, rounded once) and make the linears plain again.

    Returns:
        Number of linears changed.
    """
    experts = sum(module.merge_adapters() for module in model.modules() if isinstance(module, LoraExpertsMixin))
    modules = adapted_modules(model)
    for module in modules.values():
        module.weight.copy_(module.merged_weight().to(module.weight.dtype))
        for name in [name for name, _ in module.named_children() if name.startswith("lora_")] + ["lora_A"]:
            delattr(module, name)
        module.__class__ = next(
            base for base in type(module).__bases__ if not issubclass(base, LoraMixin | LoraVocabularyMixin)
        )
    return experts + len(modules)
