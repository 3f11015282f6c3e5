"""What `--lora-*` asks for: which linears get an adapter, of which rank, and how many parameters that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mindspeed_llm.config.run import RunConfig
from mindspeed_llm.errors import UserError
from mindspeed_llm.models.shape import ModelShape

# A fused linear of megatron-core -> its parts, named as Hugging Face names the separate linears.
FUSED_PARTS: dict[str, tuple[str, ...]] = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}
ALL_LINEAR = "all-linear"
DEFAULT_RANK = 16
DEFAULT_ALPHA = 32.0


@dataclass(frozen=True)
class AdapterSettings:
    """What defines a set of adapters; recorded inside every adapter checkpoint.

    Args:
        rank: r; A is [r, in] per adapter, B [out, r].
        alpha: the adapter's output is scaled by alpha / rank.
        dropout: probability of zeroing an input of A while training.
        targets: megatron-core linear -> its adapted parts. An empty tuple means one adapter over the whole fused
            linear (one A shared by all parts, upstream's `linear_qkv`); names mean an A of its own for each part.
    """

    rank: int
    alpha: float
    dropout: float
    targets: Mapping[str, tuple[str, ...]]

    @property
    def scaling(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    def to_json(self) -> dict[str, Any]:
        """A json record, read back by `from_json`."""
        return {
            "rank": self.rank,
            "alpha": self.alpha,
            "dropout": self.dropout,
            "targets": {module: list(parts) for module, parts in self.targets.items()},
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> AdapterSettings:
        """The settings recorded by `to_json`."""
        targets = {module: tuple(parts) for module, parts in record["targets"].items()}
        return cls(record["rank"], record["alpha"], record["dropout"], targets)


def resolve_targets(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Targets from mcore names, HF names or `all-linear`.

    Raises:
        UserError: a name is unknown, or a fused linear is named both as a whole and by part.
    """
    targets: dict[str, tuple[str, ...]] = {}
    part_of = {part: module for module, parts in FUSED_PARTS.items() for part in parts}
    wholes = set(FUSED_PARTS) if ALL_LINEAR in names else {n for n in names if n in FUSED_PARTS}
    for name in names:
        if name not in FUSED_PARTS and name not in part_of and name != ALL_LINEAR:
            legal = ", ".join([*FUSED_PARTS, *part_of, ALL_LINEAR])
            raise UserError(f"lora: target {name!r} matches no linear of this model; legal: {legal}")
        if name in part_of and part_of[name] in wholes:
            raise UserError(
                f"lora: target {name!r} is already inside {part_of[name]!r}; name either the fused linear or its parts"
            )
    for module, parts in FUSED_PARTS.items():
        named = tuple(p for p in parts if p in names)
        if module in wholes:
            targets[module] = ()
        elif named:
            # A linear with a single part has nothing to share: by part and as a whole are the same adapter.
            targets[module] = named if len(parts) > 1 else ()
    return targets


def adapters_asked_for(config: RunConfig) -> AdapterSettings | None:
    """The settings that the options describe, or None when they ask for no adapters.

    Raises:
        UserError: an unknown target.
    """
    lora = config.lora
    if lora.lora_r is None and lora.lora_target_modules is None:
        return None
    return AdapterSettings(
        rank=lora.lora_r or DEFAULT_RANK,
        alpha=lora.lora_alpha if lora.lora_alpha is not None else DEFAULT_ALPHA,
        dropout=lora.lora_dropout,
        targets=resolve_targets(lora.lora_target_modules or [ALL_LINEAR]),
    )


def linear_sizes(shape: ModelShape) -> dict[str, dict[str, tuple[int, int]]]:
    """module -> part -> (in, out) of the whole linear before it is split over tensor-parallel ranks."""
    h, f, d = shape.hidden_size, shape.ffn_hidden_size, shape.kv_channels
    q, kv = shape.num_attention_heads * d, shape.num_query_groups * d
    return {
        "linear_qkv": {"q_proj": (h, q), "k_proj": (h, kv), "v_proj": (h, kv)},
        "linear_proj": {"o_proj": (q, h)},
        "linear_fc1": {"gate_proj": (h, f), "up_proj": (h, f)},
        "linear_fc2": {"down_proj": (f, h)},
    }


def adapter_parameters(shape: ModelShape, settings: AdapterSettings) -> int:
    """Parameters of all adapters of the model."""
    count = 0
    for module, parts in settings.targets.items():
        sizes = linear_sizes(shape)[module]
        width = next(iter(sizes.values()))[0]
        chosen = parts or tuple(sizes)
        count += settings.rank * (width * (len(parts) or 1) + sum(sizes[p][1] for p in chosen))
    return count * shape.num_layers
