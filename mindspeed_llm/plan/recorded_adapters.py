"""The settings of adapters that a run loads, from their checkpoint."""

from __future__ import annotations

import dataclasses
from typing import Any

from mindspeed_llm.checkpoint.detect import Found
from mindspeed_llm.config.run import RunConfig, all_options
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.plan.adaptable import adaptable_linears
from mindspeed_llm.plan.adapters import AdapterSettings, read_pattern
from mindspeed_llm.plan.peft_settings import read_peft_settings
from mindspeed_llm.plan.targets import ALL_LINEAR, Resolved, resolve_pattern, resolve_targets

# Options that may say other than the checkpoint: they change how adapters are trained and not what they compute.
FREE = {"lora_dropout": "dropout", "loraplus_lr_ratio": "loraplus_lr_ratio"}


def recorded_adapters(config: RunConfig, source: Found, shape: ModelShape, problems: list[str]) -> AdapterSettings:
    """Settings inside an adapter checkpoint; options that contradict them become problems.

    Args:
        shape: of the model that the adapters are for.

    Raises:
        UserError: an unknown target, or a PEFT feature that is not implemented.
    """
    recorded = settings_in(source, shape)
    for name, (said, value) in _said_and_recorded(config, recorded, shape).items():
        if name in config.given and said != value:
            flag = all_options()[name].flags[0]
            problems.append(f"{flag}: {said} contradicts the adapters in {source.path} ({value}); leave the flag out")
    changed = {FREE[name]: config.get(name) for name in FREE if name in config.given}
    return dataclasses.replace(recorded, **changed)


def settings_in(source: Found, shape: ModelShape) -> AdapterSettings:
    """The settings inside an adapter checkpoint, ours or PEFT's.

    Raises:
        UserError: an unknown target, or a PEFT feature that is not implemented.
    """
    if source.format == "peft":
        return read_peft_settings(source.directory, shape)
    return AdapterSettings.from_json(source.record["adapters"])


def _said_and_recorded(config: RunConfig, recorded: AdapterSettings, shape: ModelShape) -> dict[str, tuple[Any, Any]]:
    """option -> (what it says, what the checkpoint says), with equal values where they mean the same.

    Raises:
        UserError: an unknown target.
    """
    lora, there = config.lora, Resolved(dict(recorded.targets), dict(recorded.layers))
    said = there
    if lora.lora_target_modules is not None or lora.lora_exclude_modules is not None:
        said = resolve_targets(
            lora.lora_target_modules or [ALL_LINEAR],
            shape,
            layers_to_transform=lora.lora_layers_to_transform,
            exclude=lora.lora_exclude_modules or (),
        )
    targets = (_shown(said), _shown(there)) if said.layers else (said.targets, there.targets)
    ranks = read_pattern(lora.lora_rank_pattern, "--lora-rank-pattern", int)
    alphas = read_pattern(lora.lora_alpha_pattern, "--lora-alpha-pattern", float)
    return {
        "lora_r": (lora.lora_r, recorded.rank),
        "lora_alpha": (lora.lora_alpha, recorded.alpha),
        "lora_target_modules": targets,
        "lora_exclude_modules": targets,
        "lora_layers_to_transform": (sorted(lora.lora_layers_to_transform or ()), _layers(there, shape)),
        "lora_rank_pattern": (resolve_pattern(ranks, shape, there, what="rank"), dict(recorded.ranks)),
        "lora_alpha_pattern": (resolve_pattern(alphas, shape, there, what="alpha"), dict(recorded.alphas)),
        "use_rslora": (lora.use_rslora, recorded.use_rslora),
        "use_dora": (lora.use_dora, recorded.use_dora),
    }


def _shown(resolved: Resolved) -> dict[str, Any]:
    """Targets, with the layers of those that are not in all of them."""
    return {
        module: (parts, *(["layers", *resolved.layers[module]] if module in resolved.layers else ()))
        for module, parts in resolved.targets.items()
    }


def _layers(resolved: Resolved, shape: ModelShape) -> list[int]:
    """Layers with an adapter."""
    linears = [linear for linear in adaptable_linears(shape) if linear.module in resolved.targets]
    return sorted({layer for one in linears for layer in resolved.layers.get(one.module, one.layers or ())})
