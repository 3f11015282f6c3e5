"""The settings of an adapter directory written by PEFT."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspeed_llm.errors import UserError
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.plan.adaptable import Adaptable, adaptable_linears, names_in_experts, renamed
from mindspeed_llm.plan.adapters import AdapterSettings
from mindspeed_llm.plan.targets import ALL_LINEAR, resolve_pattern, resolve_targets

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What PEFT wrote before it wrote safetensors.
PICKLED_WEIGHTS = "adapter_model.bin"
# Under this name the file of the tensors may hold what our own checkpoints record about the base.
BASE = "mindspeed_llm.base"
LAYERS = "layers"  # what Hugging Face calls the list of layers in all families here
# Settings of PEFT that change the function and are not implemented here, with the value that means "off".
UNSUPPORTED = {
    "bias": "none", "fan_in_fan_out": False, "modules_to_save": None, "layer_replication": None, "lora_bias": False,
}  # fmt: skip
READ = (
    "peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "target_parameters", "exclude_modules",
    "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern",
)  # fmt: skip
# Settings without influence on what finished adapters compute.
WITHOUT_EFFECT = (
    "auto_mapping", "base_model_name_or_path", "eva_config", "inference_mode", "loftq_config",
    "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
)  # fmt: skip
# Other ways of initialising (pissa, olora, corda, loftq, lora_ga) change the base too, which the adapters then need.
PLAIN_INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva", None)


@contextmanager
def adapter_file(directory: Path) -> Iterator[tuple[Collection[str], Callable[[str], Tensor]]]:
    """The tensors of a PEFT directory, in either form: their names, and what reads one.

    Raises:
        UserError: there is no file of tensors, or it is damaged.
    """
    if (directory / WEIGHTS).is_file():
        with _opened(directory / WEIGHTS) as file:
            yield file.keys(), file.get_tensor
    elif (directory / PICKLED_WEIGHTS).is_file():
        tensors = _unpickled(directory / PICKLED_WEIGHTS)
        yield tensors.keys(), tensors.__getitem__
    else:
        raise UserError(f"lora: {directory} has no {WEIGHTS}; legal: a directory that PEFT saved; try: copy it again")


def _opened(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, "pt")
    except SafetensorError as wrong:
        raise UserError(f"lora: {path} is damaged ({wrong}); try: copy it again") from None


def _unpickled(path: Path) -> dict[str, Tensor]:
    """What PEFT pickled, in host memory whatever device it was on."""
    import torch

    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        return {name: tensors[name] for name in tensors.keys()}
    except Exception as wrong:  # of pickle, of zip archives, of torch; some without a message
        why = (str(wrong).strip() or type(wrong).__name__).splitlines()[0]
        raise UserError(f"lora: {path} is damaged ({why}); try: copy it again") from None


def read_peft_settings(directory: Path, shape: ModelShape) -> AdapterSettings:
    """The settings in a PEFT directory.

    Args:
        shape: of the model that the adapters are for.

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
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise UserError(f"lora: r={rank!r}, lora_alpha={alpha!r} in {path} is wrong; legal: a positive rank, a number")
    resolved = resolve_targets(
        _target_words(config, path, shape),
        shape,
        layers_to_transform=_layers_to_transform(config, path),
        exclude=_words(config.get("exclude_modules")),
    )
    patterns = {
        what: resolve_pattern(config.get(f"{what}_pattern") or {}, shape, resolved, what=what, all_used=False)
        for what in ("rank", "alpha")
    }
    return AdapterSettings(
        rank=rank,
        alpha=float(alpha),
        dropout=float(config.get("lora_dropout") or 0.0),
        targets=resolved.targets,
        layers=resolved.layers,
        ranks=patterns["rank"],
        alphas=patterns["alpha"],
        use_rslora=bool(config.get("use_rslora")),
        use_dora=bool(config.get("use_dora")),
    )


def _words(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _target_words(config: dict[str, Any], path: Path, shape: ModelShape) -> list[str]:
    targets, parameters = config.get("target_modules"), _words(config.get("target_parameters"))
    if not targets and not parameters:
        raise UserError(f"lora: target_modules={targets!r} in {path} names no linear; legal: names or an expression")
    # The weight of a linear, or what stacks those of all experts.
    parameters = [name.removesuffix(".weight") for name in parameters]
    if targets == ALL_LINEAR:
        # Hugging Face's linears, each with an A of its own.
        everything = resolve_targets([ALL_LINEAR], shape).targets
        linears = [linear for linear in adaptable_linears(shape) if linear.module in everything]
        return [part for linear in linears for part in linear.parts] + parameters
    return _words(targets) + parameters


def _layers_to_transform(config: dict[str, Any], path: Path) -> list[int] | None:
    layers, pattern = config.get("layers_to_transform"), config.get("layers_pattern")
    if layers is None or layers == []:
        return None
    if _words(pattern) not in ([], [LAYERS]):
        raise UserError(f"lora: layers_pattern={pattern!r} in {path} is not supported; legal: {LAYERS!r}")
    return [layers] if isinstance(layers, int) else list(layers)


def stacked_rank(settings: AdapterSettings, linear: Adaptable) -> int:
    """Rank of the adapter of a linear of experts where its parts are one: the sum of theirs, unless they share A."""
    ranks = [settings.rank_of(linear.module, part) for part in settings.targets[linear.module] or tuple(linear.parts)]
    return sum(ranks) if settings.targets[linear.module] else ranks[0]


@dataclass(frozen=True)
class _Target:
    """What one or several entries of target_modules, or of target_parameters, mean.

    Attributes:
        key: of rank_pattern and alpha_pattern.
    """

    names: tuple[str, ...]
    is_parameter: bool
    key: str
    rank: int
    scaling: float


def _targets(settings: AdapterSettings, shape: ModelShape) -> Iterator[_Target]:
    linears = [linear for linear in adaptable_linears(shape) if linear.module in settings.targets]
    chosen = {linear.module: settings.targets[linear.module] or tuple(linear.parts) for linear in linears}
    every, gone = [part for parts in chosen.values() for part in parts], names_in_experts(shape)
    for linear in linears:
        layers = settings.layers.get(linear.module)
        if linear.experts:
            paths = [linear.stacked_path(layer) for layer in layers or (0,)]
            scaling = settings.scaling_of(linear.module, chosen[linear.module][0])
            tail = _in_layer(paths[0])
            yield _Target(
                tuple(paths) if layers else (tail,), True, re.escape(tail), stacked_rank(settings, linear), scaling
            )
            continue
        for part in chosen[linear.module]:
            how = settings.rank_of(linear.module, part), settings.scaling_of(linear.module, part)
            paths = [renamed(linear.hf_path(part, layer)) for layer in layers or (0,)]
            if part in gone:
                # PEFT takes such names for those of experts, wherever they are; parameters it leaves alone.
                tail = _in_layer(paths[0]) + ".weight"
                names = tuple(f"{path}.weight" for path in paths) if layers else (tail,)
                yield _Target(names, True, re.escape(tail), *how)
                continue
            place = re.escape(linear.hf[part]).replace(r"\{i\}", r"\d+")
            yield _Target(tuple(paths) if layers else (part,), False, part if every.count(part) == 1 else place, *how)


def _in_layer(path: str) -> str:
    """A path behind the number of its layer."""
    return re.sub(r"^.*\.\d+\.", "", path, count=1)


def peft_record(settings: AdapterSettings, shape: ModelShape, base: str | None) -> dict[str, Any]:
    """What adapter_config.json says about adapters of a model.

    Args:
        base: name or path of the base model.

    Raises:
        UserError: PEFT has no such adapters.
    """
    targets = list(_targets(settings, shape))
    parameters = sorted({name for target in targets if target.is_parameter for name in target.names})
    if parameters and settings.use_dora:
        raise UserError(
            f"lora: --use-dora with {parameters[0]} cannot be exported, because PEFT has no magnitudes for parameters "
            "of models with experts; legal: a merged model; try: --save-model-type hf without --save-lora-to-hf"
        )
    power = 0.5 if settings.use_rslora else 1.0
    alphas = {target.key: target.scaling * target.rank**power for target in targets}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        # PEFT has none for parameters, and no use for it in finished adapters.
        "lora_dropout": 0.0 if parameters else settings.dropout,
        "target_modules": sorted({name for target in targets if not target.is_parameter for name in target.names}),
        "target_parameters": parameters or None,
        "rank_pattern": {target.key: target.rank for target in targets if target.rank != settings.rank},
        "alpha_pattern": {key: alpha for key, alpha in alphas.items() if not math.isclose(alpha, settings.alpha)},
        "use_rslora": settings.use_rslora,
        "use_dora": settings.use_dora,
        "inference_mode": True,
        **UNSUPPORTED,
    }


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
