"""Which linears `--lora-target-modules` and its patterns mean: names of megatron-core, Hugging Face and MindFormers.

A word without special characters matches a path that is it or ends with "." and it, like the elements of PEFT's
target_modules; with special characters it is a regular expression for a whole path, like PEFT's target_modules that
is one string. Paths are "decoder.layers.3.self_attention.linear_qkv" (a fused linear as a whole),
"model.layers.3.self_attn.q_proj" and "model.layers.3.attention.wq" (one part of it).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from mindspeed_llm.errors import UserError
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.plan.adaptable import Adaptable, adaptable_linears, renamed

ALL_LINEAR = "all-linear"
ALL_ROUTER = "all-router"
ROUTER = "router"
SPECIAL = frozenset(r"\*+?[](){}|^$")
# Hugging Face's name -> that of MindFormers (MindSpore Transformers), which are those of the first Llama.
MINDFORMERS = {
    "q_proj": "attention.wq", "k_proj": "attention.wk", "v_proj": "attention.wv", "o_proj": "attention.wo",
    "gate_proj": "feed_forward.w1", "down_proj": "feed_forward.w2", "up_proj": "feed_forward.w3",
}  # fmt: skip


@dataclass
class Resolved:
    """What patterns mean for one model; the fields of AdapterSettings with these names."""

    targets: dict[str, tuple[str, ...]] = field(default_factory=dict)
    layers: dict[str, tuple[int, ...]] = field(default_factory=dict)


def matches(word: str, path: str) -> bool:
    """Whether a word of the options means a path."""
    if SPECIAL & set(word):
        return re.fullmatch(word, path) is not None
    return path == word or path.endswith("." + word)


def part_paths(linear: Adaptable, part: str, layer: int, expert: int) -> Iterator[str]:
    """All paths of one part of a linear: Hugging Face's (of files and modules) and, where it has one, MindFormers'."""
    path = linear.hf_path(part, layer, expert)
    yield from dict.fromkeys((path, renamed(path)))
    if part in MINDFORMERS:
        yield f"{path.rsplit('.', 2)[0]}.{MINDFORMERS[part]}"


def stacked_paths(linear: Adaptable, layer: int) -> Iterator[str]:
    """The parameter of transformers 5 that all experts' linears of a layer are, if they are one."""
    if linear.experts:
        yield linear.stacked_path(layer)


def resolve_targets(
    words: Sequence[str],
    shape: ModelShape,
    *,
    layers_to_transform: Sequence[int] | None = None,
    exclude: Sequence[str] = (),
) -> Resolved:
    """The linears that the words mean.

    Args:
        words: names, regular expressions, `all-linear` (every linear inside a layer but the router), `all-router`.
        layers_to_transform: the only layers that get adapters; None for all.
        exclude: words that take away what they match.

    Raises:
        UserError: a word matches nothing or is no regular expression, a fused linear is meant both as a whole and by
            part, or the parts differ between layers.
    """
    for word in (*words, *exclude):
        check_pattern(word)
    linears = adaptable_linears(shape)
    _check_layers(layers_to_transform, shape)
    resolved, seen = Resolved(), set()
    for linear in linears:
        chosen = {}
        for layer in (0,) if linear.layers is None else linear.layers:
            if layers_to_transform is not None and (linear.layers is None or layer not in layers_to_transform):
                continue
            parts, used = _chosen_parts(linear, layer, words, exclude)
            seen |= used
            if parts is not None:
                chosen[layer] = parts
        if chosen:
            resolved.targets[linear.module] = _same_in_all(linear, chosen)
            if linear.layers is not None and len(chosen) < len(linear.layers):
                resolved.layers[linear.module] = tuple(chosen)
    for word in words:
        if word not in seen:
            raise UserError(f"lora: target {word!r} matches no linear of this model; legal: {there(linears)}")
    if not resolved.targets:
        raise UserError("lora: targets are all excluded again; legal: at least one that is not")
    return resolved


def check_pattern(word: str) -> None:
    """Refuse what is no regular expression.

    Raises:
        UserError: it is none.
    """
    try:
        re.compile(word)
    except re.error as wrong:
        raise UserError(
            f"lora: pattern {word!r} is wrong, because it is no regular expression ({wrong}); legal: a name such as "
            r"q_proj, or an expression such as .*layers\.[0-3]\..*q_proj"
        ) from None


def check_excluded(words: Sequence[str], shape: ModelShape) -> None:
    """Refuse words that take nothing away from any target.

    Raises:
        UserError: there is one.
    """
    linears = adaptable_linears(shape)
    for word in words:
        check_pattern(word)
        if not any(
            _excluded(linear, part, layer, expert, [word])
            for linear in linears
            for layer in linear.layers or (0,)
            for expert in sorted({0, max(linear.experts - 1, 0)})
            for part in linear.parts
        ):
            raise UserError(
                f"--lora-exclude-modules: {word!r} matches no linear of this model; legal: {there(linears)}"
            )


def there(linears: Sequence[Adaptable]) -> str:
    """The names that a model has, for a message."""
    modules = [linear.module for linear in linears]
    parts = [part for linear in linears for part in linear.parts]
    return _listed([*modules, *parts, ALL_LINEAR, *([ALL_ROUTER] if ROUTER in modules else [])])


def _listed(names: Iterable[str]) -> str:
    """Names with commas, each once: dense layers, experts and shared experts call their parts alike."""
    return ", ".join(dict.fromkeys(names))


def _check_layers(layers: Sequence[int] | None, shape: ModelShape) -> None:
    count = shape.num_layers + shape.mtp_num_layers
    if wrong := [layer for layer in layers or () if not 0 <= layer < count]:
        raise UserError(
            f"--lora-layers-to-transform: {wrong[0]} is wrong, because the model has {count} layers; "
            f"legal: 0 to {count - 1}"
        )


def _chosen_parts(
    linear: Adaptable, layer: int, words: Sequence[str], exclude: Sequence[str]
) -> tuple[tuple[str, ...] | None, set[str]]:
    """((), the chosen parts, or None when there is nothing; the words that matched) for a linear of one layer."""
    # An expression could single out experts: then the first and the last are not both meant.
    found = [_parts_of_one(linear, layer, expert, words, exclude) for expert in sorted({0, max(linear.experts - 1, 0)})]
    if found[0] != found[-1]:
        raise UserError(
            f"lora: targets mean {linear.module} of some experts of layer {layer} alone; legal: all experts of a layer"
        )
    return found[0]


def _parts_of_one(
    linear: Adaptable, layer: int, expert: int, words: Sequence[str], exclude: Sequence[str]
) -> tuple[tuple[str, ...] | None, set[str]]:
    wholes = [linear.path(layer, expert), *stacked_paths(linear, layer)]
    by_name = {word for word in words if word == linear.module or _in_group(word, linear)}
    whole = by_name | {word for word in words if any(matches(word, path) for path in wholes)}
    by_part = {
        part: {word for word in words if any(matches(word, p) for p in part_paths(linear, part, layer, expert))}
        for part in linear.parts
    }
    used = set().union(whole, *by_part.values())
    if not used:
        return None, used
    gone = {part for part in linear.parts if _excluded(linear, part, layer, expert, exclude)}
    if len(linear.parts) == 1:
        # A linear with a single part has nothing to share: by part and as a whole are the same adapter.
        return (None if gone else ()), used
    named = tuple(part for part, by in by_part.items() if by)
    # An expression that fits both names is read as PEFT reads it, by Hugging Face's.
    whole -= set().union(*by_part.values())
    if whole and named:
        raise UserError(
            f"lora: target {sorted(by_part[named[0]])[0]!r} is already inside {sorted(whole)[0]!r}; name either the "
            "fused linear or its parts"
        )
    if whole and not gone:
        return (), used
    left = tuple(part for part in named or linear.parts if part not in gone)
    return left or None, used


def _in_group(word: str, linear: Adaptable) -> bool:
    if word == ALL_ROUTER:
        return linear.module == ROUTER
    return word == ALL_LINEAR and linear.module != ROUTER and linear.cut != "vocabulary"


def _excluded(linear: Adaptable, part: str, layer: int, expert: int, exclude: Sequence[str]) -> bool:
    paths = [linear.path(layer, expert), *stacked_paths(linear, layer), *part_paths(linear, part, layer, expert)]
    return any(matches(word, path) for word in exclude for path in paths)


def _same_in_all(linear: Adaptable, chosen: Mapping[int, tuple[str, ...]]) -> tuple[str, ...]:
    """The parts, which must be the same in every layer that has some: A is one stacked matrix of the same rows."""
    (first, parts), *others = chosen.items()
    for layer, also in others:
        if also != parts:
            raise UserError(
                f"lora: targets mean {', '.join(parts) or 'all'} of {linear.module} in layer {first} and "
                f"{', '.join(also) or 'all'} in layer {layer}; legal: the same parts in every layer"
            )
    return parts


def resolve_pattern(
    pattern: Mapping[str, float], shape: ModelShape, resolved: Resolved, *, what: str, all_used: bool = True
) -> dict[str, float]:
    """PEFT's rank_pattern or alpha_pattern: the value of each linear ("linear_qkv") or part ("linear_qkv/q_proj").

    A key matches like PEFT's: as a regular expression for a path from behind a "." to its end; the first one counts.

    Args:
        what: "rank" or "alpha", for messages; parts that share A have one rank, but may differ in alpha.
        all_used: whether each key has to count somewhere.

    Raises:
        UserError: a key matches no adapter, single layers of a linear, or one of parts that share A.
    """
    for key in pattern:
        check_pattern(key)
    values: dict[str, float] = {}
    used: set[str] = set()
    for linear in adaptable_linears(shape):
        if linear.module not in resolved.targets:
            continue
        parts = resolved.targets[linear.module] or tuple(linear.parts)
        found = {}
        for part in parts:
            keys = _keys_of_part(linear, part, pattern, resolved, what)
            used |= keys
            if keys:
                found[part] = pattern[min(keys)]
        if len(found) == len(parts) and len(set(found.values())) == 1:
            values[linear.module] = found[parts[0]]
        elif found and what == "rank" and not resolved.targets[linear.module]:
            raise UserError(
                f"lora: rank of {next(iter(found))} is wrong, because all of {linear.module} has one adapter; legal: "
                f"one for {linear.module}; try: its parts as targets ({', '.join(linear.parts)})"
            )
        else:
            values |= {f"{linear.module}/{part}": value for part, value in found.items()}
    if all_used and (unused := [key for key in pattern if key not in used]):
        legal = _listed([*resolved.targets, *(part for parts in resolved.targets.values() for part in parts)])
        raise UserError(
            f"lora: {what} pattern {unused[0]!r} matches no adapter, or none that is left by those in front of it; "
            f"legal: {legal}"
        )
    return values


def _keys_of_part(
    linear: Adaptable, part: str, pattern: Mapping[str, float], resolved: Resolved, what: str
) -> set[str]:
    """The keys that count for a part, in one layer or another: all with one value, or none at all."""
    found = {
        _first_key(linear, part, layer, expert, pattern)
        for layer in resolved.layers.get(linear.module, linear.layers or (0,))
        for expert in sorted({0, max(linear.experts - 1, 0)})
    }
    keys = {key for key in found if key is not None}
    if keys and (None in found or len({pattern[key] for key in keys}) > 1):
        raise UserError(
            f"lora: {what} pattern {sorted(keys)[0]!r} means {part} of some layers or experts alone; legal: one {what} "
            "for a linear in all its layers"
        )
    return keys


def _first_key(linear: Adaptable, part: str, layer: int, expert: int, pattern: Mapping[str, float]) -> str | None:
    paths = [linear.path(layer, expert), *stacked_paths(linear, layer), *part_paths(linear, part, layer, expert)]
    # PEFT's keys of parameters that are not stacked end with their name.
    paths += [f"{path}.weight" for path in part_paths(linear, part, layer, expert)]
    return next((key for key in pattern if any(_ends_with(key, path) for path in paths)), None)


def _ends_with(key: str, path: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", path) is not None
