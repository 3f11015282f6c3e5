"""The settings of an adapter directory written by PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mindspeed_llm.errors import UserError
from mindspeed_llm.plan.adapters import AdapterSettings, resolve_targets

CONFIG = "adapter_config.json"
# Settings of PEFT that change the function and are not implemented here, with the value that means "off".
UNSUPPORTED = {
    "use_rslora": False, "use_dora": False, "bias": "none", "fan_in_fan_out": False, "modules_to_save": None,
    "rank_pattern": {}, "alpha_pattern": {}, "layers_to_transform": None, "layer_replication": None,
    "lora_bias": False, "target_parameters": None, "exclude_modules": None,
}  # fmt: skip
READ = ("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules")
# Settings without influence on what finished adapters compute.
WITHOUT_EFFECT = (
    "auto_mapping", "base_model_name_or_path", "eva_config", "inference_mode", "layers_pattern", "loftq_config",
    "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
)  # fmt: skip
# Other ways of initialising (pissa, olora, corda, loftq, lora_ga) change the base too, which the adapters then need.
PLAIN_INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva", None)


def read_peft_settings(directory: Path) -> AdapterSettings:
    """The settings in a PEFT directory.

    Raises:
        UserError: it uses something that is not implemented or not known here, or it is damaged.
    """
    path = directory / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as wrong:
        raise UserError(f"lora: {path} is damaged ({wrong}); try: copy it again") from None
    if config.get("peft_type") != "LORA":
        raise UserError(f"lora: {directory} holds {config.get('peft_type')} adapters; legal: LORA")
    _check_features(config, path)
    targets, rank, alpha = (config.get(name) for name in ("target_modules", "r", "lora_alpha"))
    if isinstance(targets, str):
        raise UserError(f"lora: target_modules={targets!r} in {path} is a pattern; legal: a list of names")
    if not targets:
        raise UserError(f"lora: target_modules={targets!r} in {path} names no linear; legal: a list of names")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise UserError(f"lora: r={rank!r}, lora_alpha={alpha!r} in {path} is wrong; legal: a positive rank, a number")
    names = [name.rsplit(".", 1)[-1] for name in targets]
    return AdapterSettings(rank, float(alpha), float(config.get("lora_dropout") or 0.0), resolve_targets(names))


def _check_features(config: dict[str, Any], path: Path) -> None:
    for name, value in config.items():
        if name in READ or name in WITHOUT_EFFECT:
            continue
        if name == "init_lora_weights":
            if value not in PLAIN_INITIALISATIONS:
                raise UserError(
                    f"lora: init_lora_weights={value!r} in {path} is not supported, because it changes the base model; "
                    "legal: true; try: save them with peft's path_initial_model_for_weight_conversion"
                )
        elif value not in (UNSUPPORTED.get(name), None, False, [], {}):
            legal = repr(UNSUPPORTED[name]) if name in UNSUPPORTED else "to leave it out"
            raise UserError(f"lora: {name}={value!r} in {path} is not supported; legal: {legal}")
