"""The RoPE fields of config.json: `rope_theta`, `rope_scaling`, and `rope_parameters` of transformers 5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindspeed_llm.errors import UserError
from mindspeed_llm.models.family import Variant

_LENGTH = "original_max_position_embeddings"
_ROPE_PARAMETERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # rope_type -> (required, optional)
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", _LENGTH), ()),
    "yarn": (
        (_LENGTH,),
        ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": (("short_factor", "long_factor", _LENGTH), ("factor", "attention_factor")),
}
_OLD_ROPE_NAMES = {"su": "longrope"}  # Phi-3's first configs


def read_rope(config: Mapping[str, Any], variant: Variant, values: dict[str, Any]) -> set[str]:
    """Read every RoPE field of a config.

    Args:
        config: raw json of config.json.
        variant: says which base is the default and whether a partial rotation is honoured.
        values: shape values read so far; rotary_base, rotary_percent and rope_scaling are added.

    Returns:
        Names of the config fields that are accounted for.

    Raises:
        UserError: a type or parameter is not implemented, missing, or stated twice differently.
    """
    scaling, parameters = config.get("rope_scaling") or {}, config.get("rope_parameters") or {}
    for name, given in (("rope_scaling", scaling), ("rope_parameters", parameters)):
        if not isinstance(given, Mapping) or any(isinstance(value, Mapping) for value in given.values()):
            raise UserError(
                f"config: {name!r} in config.json is not a flat object (RoPE that differs by layer is not implemented)"
            )
    top = {name: config[name] for name in ("rope_theta", "partial_rotary_factor") if config.get(name) is not None}
    merged = _agreeing(top, _plain_names(parameters), _plain_names(scaling))
    base = merged.pop("rope_theta", variant.rope_theta)
    if isinstance(base, bool) or not isinstance(base, (int, float)) or base <= 0:
        raise UserError(f"config: rope_theta={base!r} in config.json is wrong; legal: a positive number")
    values["rotary_base"] = float(base)
    _read_partial_rotary(merged, variant, values)
    understood = {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"}
    if _LENGTH in config:
        understood.add(_LENGTH)
    values["rope_scaling"] = _rope_scaling(merged, config.get(_LENGTH), values["max_position_embeddings"])
    return understood


def _plain_names(given: Mapping[str, Any]) -> dict[str, Any]:
    """A copy without nulls, with the older names `type` and `su` replaced."""
    parameters = {name: value for name, value in given.items() if value is not None}
    old = parameters.pop("type", None)
    if old is not None:
        parameters.setdefault("rope_type", old)
    if "rope_type" in parameters:
        parameters["rope_type"] = _OLD_ROPE_NAMES.get(parameters["rope_type"], parameters["rope_type"])
    return parameters


def _agreeing(*sources: Mapping[str, Any]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for source in sources:
        for name, value in source.items():
            if merged.setdefault(name, value) != value:
                raise UserError(
                    f"config: config.json states {name} twice, as {merged[name]!r} and {value!r}; try: remove one of "
                    f"rope_theta, rope_scaling, rope_parameters"
                )
    return merged


def _read_partial_rotary(merged: dict[str, Any], variant: Variant, values: dict[str, Any]) -> None:
    default = 1.0 if variant.partial_rotary_factor is None else variant.partial_rotary_factor
    factor = merged.pop("partial_rotary_factor", default)
    if variant.partial_rotary_factor is None and factor != 1.0:
        raise UserError(
            f"config: partial_rotary_factor={factor} in config.json is not honoured by "
            f"model_type={variant.model_type}; legal: 1.0"
        )
    values["rotary_percent"] = float(factor)


def _rope_scaling(merged: dict[str, Any], length: int | None, max_length: int) -> dict[str, Any] | None:
    """The parameters of a scaled RoPE, complete and checked; None for plain RoPE."""
    rope_type = merged.setdefault("rope_type", "default")
    if rope_type not in _ROPE_PARAMETERS:
        raise UserError(
            f"config: 'rope_scaling.rope_type={rope_type}' in config.json is not implemented; converting would change "
            f"outputs silently; legal: {', '.join(_ROPE_PARAMETERS)}"
        )
    required, optional = _ROPE_PARAMETERS[rope_type]
    if _LENGTH in required:
        # a length beside the rope object wins, as in transformers (Phi-3 writes it there); without any, the model was
        # trained at its full length
        merged[_LENGTH] = length if length is not None else merged.get(_LENGTH, max_length)
    elif rope_type != "default" and length is not None:
        raise UserError(f"config: {_LENGTH}={length} in config.json has no meaning for rope_type={rope_type}")
    if missing := [name for name in required if name not in merged]:
        raise UserError(f"config: rope_type={rope_type} in config.json needs {', '.join(missing)}")
    if unknown := sorted(set(merged) - {"rope_type", *required, *optional}):
        raise UserError(
            f"config: RoPE parameter {unknown[0]!r} in config.json is not known for rope_type={rope_type}; legal: "
            f"{', '.join((*required, *optional)) or 'none'}"
        )
    return None if rope_type == "default" else merged
