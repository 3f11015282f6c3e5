"""What `--lora-*` asks for: which linears get an adapter, of which rank, and how many parameters that is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
        rank: r where `ranks` says nothing else; A is [r, in] per adapter, B [out, r].
        alpha: likewise; the adapter's output is scaled by alpha / r.
        dropout: probability of zeroing an input of A while training.
        targets: megatron-core linear -> its adapted parts. An empty tuple means one adapter over the whole fused
            linear (one A shared by all parts, upstream's `linear_qkv`); names mean an A of its own for each part.
        layers: linear -> the layers that have an adapter on it, where those are not all.
        ranks: linear, or "linear/part" for a part with an A of its own -> its rank (PEFT's rank_pattern).
        alphas: linear or "linear/part" -> its alpha (PEFT's alpha_pattern).
        use_rslora: scale by alpha / sqrt(r) instead. Kalajdzievski, "A Rank Stabilization Scaling Factor for
            Fine-Tuning with LoRA" (2023), equation 4.
        use_dora: the sum of weight and adapter gives directions only, and each output row has a trained magnitude.
            Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation" (2024), equation 5.
        loraplus_lr_ratio: learning rate of B (and of magnitudes) over that of A. Hayou et al., "LoRA+: Efficient Low
            Rank Adaptation of Large Models" (2024).
    """

    rank: int
    alpha: float
    dropout: float
    targets: Mapping[str, tuple[str, ...]]
    layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    loraplus_lr_ratio: float = 1.0

    def rank_of(self, module: str, part: str) -> int:
        """Rank of the adapter of one part of a linear."""
        return self.ranks.get(f"{module}/{part}", self.ranks.get(module, self.rank))

    def alpha_of(self, module: str, part: str) -> float:
        """alpha of the adapter of one part of a linear."""
        return self.alphas.get(f"{module}/{part}", self.alphas.get(module, self.alpha))

    def scaling_of(self, module: str, part: str) -> float:
        """What the product of B and A of one part of a linear is multiplied by."""
        rank = self.rank_of(module, part)
        return self.alpha_of(module, part) / (math.sqrt(rank) if self.use_rslora else rank)

    def adapts(self, module: str, layer: int) -> bool:
        """Whether a linear of one layer has an adapter."""
        return module in self.targets and layer in self.layers.get(module, (layer,))

    def to_json(self) -> dict[str, Any]:
        """A json record, read back by `from_json`."""
        record = dataclasses.asdict(self)
        record["targets"] = {module: list(parts) for module, parts in self.targets.items()}
        record["layers"] = {module: list(layers) for module, layers in self.layers.items()}
        return record

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> AdapterSettings:
        """The settings recorded by `to_json`, also by versions that knew fewer of them.

        Raises:
            UserError: a newer version recorded a setting that is not known here.
        """
        known = {each.name for each in dataclasses.fields(cls)}
        if unknown := sorted(set(record) - known):
            raise UserError(
                f"lora: setting {unknown[0]!r} in the checkpoint's record is not known, because a newer version wrote "
                f"it; legal: {', '.join(sorted(known))}; try: that version"
            )
        values = dict(record)
        values["targets"] = {module: tuple(parts) for module, parts in record["targets"].items()}
        values["layers"] = {module: tuple(layers) for module, layers in record.get("layers", {}).items()}
        return cls(**values)


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
