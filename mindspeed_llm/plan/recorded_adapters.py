"""The settings of adapters that a run loads, from their checkpoint."""

from __future__ import annotations

import dataclasses

from mindspeed_llm.checkpoint.detect import Found
from mindspeed_llm.config.run import RunConfig, all_options
from mindspeed_llm.plan.adapters import AdapterSettings, adapters_asked_for
from mindspeed_llm.plan.peft_settings import read_peft_settings


def recorded_adapters(config: RunConfig, source: Found, problems: list[str]) -> AdapterSettings:
    """Settings inside an adapter checkpoint; options that contradict them become problems.

    Raises:
        UserError: an unknown target, or a PEFT feature that is not implemented.
    """
    asked = adapters_asked_for(config)
    if source.format == "peft":
        recorded = read_peft_settings(source.directory)
    else:
        recorded = AdapterSettings.from_json(source.record["adapters"])
    checks = {"lora_r": recorded.rank, "lora_alpha": recorded.alpha, "lora_target_modules": dict(recorded.targets)}
    for name, value in checks.items():
        if name not in config.given:
            continue
        said = dict(asked.targets) if name == "lora_target_modules" else config.get(name)
        if said != value:
            flag = all_options()[name].flags[0]
            problems.append(f"{flag}: {said} contradicts the adapters in {source.path} ({value}); leave the flag out")
    if "lora_dropout" in config.given:
        return dataclasses.replace(recorded, dropout=config.lora.lora_dropout)
    return recorded
