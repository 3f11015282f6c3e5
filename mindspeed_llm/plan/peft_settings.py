"""The settings of an adapter directory written by PEFT."""

from __future__ import annotations

import json
from pathlib import Path

from mindspeed_llm.errors import UserError
from mindspeed_llm.plan.adapters import AdapterSettings, resolve_targets

CONFIG = "adapter_config.json"
# Settings of PEFT that change the function and are not implemented here, with the value that means "off".
UNSUPPORTED = {
    "use_rslora": False, "use_dora": False, "bias": "none", "fan_in_fan_out": False, "modules_to_save": None,
    "rank_pattern": {}, "alpha_pattern": {}, "layers_to_transform": None, "layer_replication": None,
    "lora_bias": False, "target_parameters": None, "exclude_modules": None,
}  # fmt: skip


def read_peft_settings(directory: Path) -> AdapterSettings:
    """The settings in a PEFT directory.

    Raises:
        UserError: it uses something that is not implemented here.
    """
    config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    if config.get("peft_type") != "LORA":
        raise UserError(f"lora: {directory} holds {config.get('peft_type')} adapters; legal: LORA")
    for name, off in UNSUPPORTED.items():
        if config.get(name) not in (off, None, [], {}):
            raise UserError(f"lora: {name}={config[name]!r} in {directory / CONFIG} is not supported; legal: {off!r}")
    targets = config["target_modules"]
    if isinstance(targets, str):
        raise UserError(
            f"lora: target_modules={targets!r} in {directory / CONFIG} is a pattern; legal: a list of names"
        )
    names = [name.rsplit(".", 1)[-1] for name in targets]
    dropout = float(config.get("lora_dropout") or 0.0)
    return AdapterSettings(int(config["r"]), float(config["lora_alpha"]), dropout, resolve_targets(names))
