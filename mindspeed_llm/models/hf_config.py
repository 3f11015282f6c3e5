"""config.json -> ModelShape, read as raw json so that nobody's defaults slip in between.

Every field must be understood: it is mapped by the family, known to have no numeric meaning, or an error.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mindspeed_llm.errors import UserError
from mindspeed_llm.models.family import (
    ConfigField,
    Family,
    Quotient,
    Required,
    SameAs,
    Sum,
    Variant,
    family_of_model_type,
)
from mindspeed_llm.models.hf_experts import read_experts
from mindspeed_llm.models.hf_rope import read_rope
from mindspeed_llm.models.shape import ModelShape

IGNORED_FIELDS = frozenset(
    # bookkeeping of transformers
    "_name_or_path _attn_implementation_autoset _attn_implementation _experts_implementation _commit_hash "
    "attn_implementation architectures model_type transformers_version torch_dtype dtype use_cache return_dict "
    "output_attentions output_hidden_states torchscript tokenizer_class tie_last_hidden_states "
    # other tasks than causal language modelling
    "id2label label2id num_labels problem_type finetuning_task task_specific_params is_encoder_decoder is_decoder "
    "add_cross_attention cross_attention_hidden_size tie_encoder_decoder decoder_start_token_id prefix "
    # execution details that compute the same function
    "chunk_size_feed_forward pruned_heads use_bfloat16 tf_legacy_loss base_model_tp_plan base_model_pp_plan "
    # token ids belong to the tokenizer and to generation_config.json
    "bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id forced_bos_token_id forced_eos_token_id "
    "suppress_tokens begin_suppress_tokens bad_words_ids "
    # sampling settings of old configs
    "max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty "
    "temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size "
    "encoder_no_repeat_ngram_size num_return_sequences output_scores return_dict_in_generate "
    "exponential_decay_length_penalty remove_invalid_values "
    # marks left by fine-tuning tools
    "unsloth_fixed unsloth_version".split()
)


def read_hf_config(path: str | Path) -> dict[str, Any]:
    """The raw json of a config file.

    Args:
        path: a directory that holds config.json, or a json file.

    Raises:
        UserError: there is no such file or it is not a json object.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "config.json"
    if not file.is_file():
        raise UserError(f"config: {file} does not exist; legal: a Hugging Face model directory or a json file")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"config: {file} is not json ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"config: {file} holds a json {type(config).__name__}; legal: an object")
    return config


def shape_from_hf(config: Mapping[str, Any], ignore_fields: Collection[str] = ()) -> ModelShape:
    """The architecture that a config.json describes.

    Args:
        config: raw json of config.json.
        ignore_fields: names of fields to disregard although nothing here knows their meaning.

    Raises:
        UserError: a field is missing, has a value that is not implemented, or is not known at all.
    """
    family, variant = _recognise(config)
    values: dict[str, Any] = {"family": family.name, **variant.constants}
    extra: dict[str, Any] = {}
    later = []
    for name, rule in variant.fields.items():
        value = _field_value(config, name, rule)
        if isinstance(value, (SameAs, Quotient, Sum)):
            later.append((name, rule, value))
        else:
            _assign(values, extra, name, rule, value)
    for name, rule, value in later:
        _assign(values, extra, name, rule, _derive(name, value, values))
    understood = set(variant.fields) | {alias for rule in variant.fields.values() for alias in rule.aliases}
    understood |= read_rope(config, variant, values)
    understood |= _read_window(config, variant, values)
    understood |= read_experts(config, variant, values)
    _refuse_unknown(config, family, understood, ignore_fields)
    shape = ModelShape(**values, extra=extra)
    _check_shape(shape)
    return shape


def prediction_field(config: Mapping[str, Any]) -> tuple[str, int] | None:
    """Name and value of the field that counts multi-token prediction layers; None for families without them."""
    _, variant = _recognise(config)
    for name, rule in variant.fields.items():
        if rule.to == ("mtp_num_layers",):
            return next((n for n in (name, *rule.aliases) if n in config), name), _field_value(config, name, rule)
    return None


def is_nf4(config: Mapping[str, Any]) -> bool:
    """Whether config.json says that linears are stored in bitsandbytes' NF4."""
    said = config.get("quantization_config") or {}
    four_bits = said.get("load_in_4bit", said.get("_load_in_4bit")) is True
    return said.get("quant_method") == "bitsandbytes" and four_bits and said.get("bnb_4bit_quant_type") == "nf4"


def _recognise(config: Mapping[str, Any]) -> tuple[Family, Variant]:
    if "model_type" not in config:
        raise UserError("config: config.json has no 'model_type', so the family is unknown; try: add it")
    family, variant = family_of_model_type(config["model_type"])
    for architecture in config.get("architectures") or ():
        if architecture not in variant.architectures:
            raise UserError(
                f"config: architectures={architecture!r} in config.json is not a causal language model of family "
                f"{family.name}; legal: {', '.join(variant.architectures)}"
            )
    return family, variant


def _field_value(config: Mapping[str, Any], name: str, rule: ConfigField) -> Any:
    name = next((known for known in (name, *rule.aliases) if known in config), name)
    if name not in config:
        if rule.default is Required:
            raise UserError(f"config: {name!r} is missing in config.json and has no safe default; try: add it")
        return rule.default
    value = config[name]
    if value is None:
        if rule.null is Required:
            raise UserError(f"config: {name}=null in config.json has no meaning; legal: a value, or leave it out")
        return rule.null
    if rule.legal is not None:
        if value not in rule.legal:
            raise UserError(
                f"config: '{name}={value}' in config.json is not implemented; converting would change outputs "
                f"silently; legal: {', '.join(map(str, rule.legal))}"
            )
        return rule.legal[value]
    return value


_KINDS = {f.name: str(f.type).split(" ")[0] for f in dataclasses.fields(ModelShape)}
_OPTIONAL = frozenset(f.name for f in dataclasses.fields(ModelShape) if str(f.type).endswith("| None"))
_MAY_BE_ZERO = frozenset({"mtp_num_layers"})
_PYTHON_TYPES = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}


def _assign(values: dict[str, Any], extra: dict[str, Any], name: str, rule: ConfigField, value: Any) -> None:
    for target in rule.to:
        if target.startswith("extra."):
            extra[target.removeprefix("extra.")] = value
            continue
        kind = _KINDS[target]
        if value is None and target in _OPTIONAL:
            values[target] = None
            continue
        wrong = not isinstance(value, _PYTHON_TYPES[kind]) or (kind != "bool" and isinstance(value, bool))
        if wrong or (kind == "int" and value < (0 if target in _MAY_BE_ZERO else 1)):
            legal = "a positive whole number" if kind == "int" else f"a {kind}"
            raise UserError(f"config: {name}={value!r} in config.json is wrong; legal: {legal}")
        if values.get(target, value) != value:
            raise UserError(f"config: {name}={value!r} in config.json contradicts another field: {values[target]!r}")
        values[target] = float(value) if kind == "float" else value


def _derive(name: str, default: SameAs | Quotient | Sum, values: Mapping[str, Any]) -> int:
    if isinstance(default, SameAs):
        return values[default.name]
    if isinstance(default, Sum):
        return values[default.first] + values[default.second]
    numerator, denominator = values[default.numerator], values[default.denominator]
    if numerator % denominator:
        raise UserError(
            f"config: {name!r} is not given, and {default.numerator}={numerator} is not divisible by "
            f"{default.denominator}={denominator}; try: add {name!r} to config.json"
        )
    return numerator // denominator


def _read_window(config: Mapping[str, Any], variant: Variant, values: dict[str, Any]) -> set[str]:
    """Sets window_size and window_layers; returns the names of the fields it understood."""
    if variant.sliding_window == "none":
        return set()
    if variant.sliding_window == "refused":
        return _refuse_window(config)
    window = config.get("sliding_window", variant.sliding_window_default)
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise UserError(f"config: sliding_window={window!r} in config.json is wrong; legal: a positive number or null")
    if variant.sliding_window == "every_layer":
        values["window_size"] = window
        return {"sliding_window"}
    if not config.get("use_sliding_window", False):
        window = None
    num_layers = values["num_layers"]
    layers = _window_layers(config, variant, window, num_layers)
    if layers:
        values["window_size"] = window
        values["window_layers"] = None if len(layers) == num_layers else layers
    return {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}


def _refuse_window(config: Mapping[str, Any]) -> set[str]:
    types = config.get("layer_types") or ()
    if config.get("use_sliding_window") or set(types) - {"full_attention"}:
        raise UserError(
            "config: use_sliding_window=true in config.json is not implemented for this model_type; legal: false"
        )
    return {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}


def _window_layers(config: Mapping[str, Any], variant: Variant, window: int | None, num_layers: int) -> tuple[int, ...]:
    types = config.get("layer_types")
    if types is None:
        first = config.get("max_window_layers", variant.max_window_layers_default)
        return tuple(i for i in range(num_layers) if i >= first) if window is not None else ()
    if len(types) != num_layers or set(types) - {"full_attention", "sliding_attention"}:
        raise UserError(
            f"config: layer_types in config.json has {len(types)} entries of {sorted(set(types))}; legal: "
            f"{num_layers} entries, each full_attention or sliding_attention"
        )
    layers = tuple(i for i, kind in enumerate(types) if kind == "sliding_attention")
    if layers and window is None:
        raise UserError(
            "config: layer_types in config.json names sliding_attention but there is no window; try: set "
            "use_sliding_window and sliding_window"
        )
    return layers


def _refuse_unknown(
    config: Mapping[str, Any], family: Family, understood: set[str], ignore_fields: Collection[str]
) -> None:
    known = understood | IGNORED_FIELDS | family.ignored_fields
    if never := sorted(set(ignore_fields) & understood):
        raise UserError(f"config: --ignore-config-field {never[0]} names a field that is read; try: edit config.json")
    stated = {name for name, value in config.items() if value is not None}
    for name in sorted(stated - known - set(ignore_fields)):
        if name == "quantization_config" and is_nf4(config):
            continue
        if name == "quantization_config":
            raise UserError(
                "config: 'quantization_config' in config.json says that the weights are quantised in a way that is not "
                "read; legal: weights in float32, float16 or bfloat16, or bitsandbytes' 4-bit nf4"
            )
        raise UserError(
            f"config: '{name}={_shortened(config[name])}' in config.json is not known to family {family.name}; "
            f"converting could change outputs silently; try: --ignore-config-field {name} if it has no effect"
        )


def _shortened(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _check_shape(shape: ModelShape) -> None:
    if shape.num_attention_heads % shape.num_query_groups:
        raise UserError(
            f"config: num_attention_heads={shape.num_attention_heads} is not divisible by "
            f"num_key_value_heads={shape.num_query_groups}; legal: a divisor; try: the model's own config.json"
        )
    if shape.multi_latent_attention:
        _check_latent_attention(shape)
    rotary_dim = shape.rotary_dim
    if rotary_dim % 2:
        raise UserError(f"config: the rotary dimension {rotary_dim} is odd; legal: an even head_dim")
    scaling = shape.rope_scaling or {}
    for name in ("short_factor", "long_factor"):
        if name in scaling and len(scaling[name]) != rotary_dim // 2:
            raise UserError(
                f"config: RoPE's {name} in config.json has {len(scaling[name])} numbers; legal: {rotary_dim // 2}"
            )


def _check_latent_attention(shape: ModelShape) -> None:
    if shape.num_query_groups != shape.num_attention_heads:
        raise UserError(
            f"config: num_key_value_heads={shape.num_query_groups} in config.json is wrong, because multi-head latent "
            f"attention gives each of the {shape.num_attention_heads} heads a key; legal: {shape.num_attention_heads}"
        )
    if shape.kv_channels != shape.qk_head_dim + shape.qk_pos_emb_head_dim:
        raise UserError(
            f"config: qk_head_dim={shape.kv_channels} in config.json is not qk_nope_head_dim + qk_rope_head_dim = "
            f"{shape.qk_head_dim} + {shape.qk_pos_emb_head_dim}; try: remove it"
        )
