"""What `--lora-*` asks for: which linears get an adapter, of which rank, and how many parameters that is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from mindspeed_llm.config.run import RunConfig
from mindspeed_llm.errors import UserError
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.parallel.layout import ParallelLayout
from mindspeed_llm.plan.adaptable import Adaptable, adaptable_linears
from mindspeed_llm.plan.targets import ALL_LINEAR, check_excluded, resolve_pattern, resolve_targets
from mindspeed_llm.plan.trained import TrainedParts

Number = TypeVar("Number", int, float)

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


def adapters_asked_for(config: RunConfig, shape: ModelShape) -> AdapterSettings | None:
    """The settings that the options describe, or None when they ask for no adapters.

    Raises:
        UserError: a target or a pattern means nothing in this model.
    """
    lora = config.lora
    if lora.lora_r is None and lora.lora_target_modules is None:
        return None
    check_excluded(lora.lora_exclude_modules or (), shape)
    resolved = resolve_targets(
        lora.lora_target_modules or [ALL_LINEAR],
        shape,
        layers_to_transform=lora.lora_layers_to_transform,
        exclude=lora.lora_exclude_modules or (),
    )
    ranks = read_pattern(lora.lora_rank_pattern, "--lora-rank-pattern", int)
    alphas = read_pattern(lora.lora_alpha_pattern, "--lora-alpha-pattern", float)
    return AdapterSettings(
        rank=lora.lora_r or DEFAULT_RANK,
        alpha=lora.lora_alpha if lora.lora_alpha is not None else DEFAULT_ALPHA,
        dropout=lora.lora_dropout,
        targets=resolved.targets,
        layers=resolved.layers,
        ranks=resolve_pattern(ranks, shape, resolved, what="rank"),
        alphas=resolve_pattern(alphas, shape, resolved, what="alpha"),
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        loraplus_lr_ratio=lora.loraplus_lr_ratio,
    )


def check_tied_embedding(shape: ModelShape, settings: AdapterSettings) -> None:
    """Refuse an adapter of an embedding that is the output layer too: it would change one of the two uses only.

    Raises:
        UserError: there is one.
    """
    if shape.tie_word_embeddings and "word_embeddings" in settings.targets:
        raise UserError(
            "lora: word_embeddings has an adapter that changes the input alone, but the output layer is the same "
            "matrix (tie_word_embeddings); legal: adapters of other linears; try: an untied copy of the base"
        )


def check_copied_embedding(shape: ModelShape, settings: AdapterSettings, layout: ParallelLayout) -> None:
    """Refuse an adapter of an embedding that two pipeline stages hold.

    Raises:
        UserError: there is one.
    """
    if shape.mtp_num_layers and layout.pp > 1 and "word_embeddings" in settings.targets:
        raise UserError(
            "lora: word_embeddings has an adapter, and with multi-token prediction the first and the last stage hold "
            "the embedding; legal: one stage, or --mtp-num-layers 0; try: other targets"
        )


def check_directions(shape: ModelShape, settings: AdapterSettings, trained: TrainedParts) -> None:
    """Refuse magnitudes (DoRA) beside a weight that is trained too.

    Raises:
        UserError: there is one.
    """
    for linear in adaptable_linears(shape):
        for layer, expert in linear.places():
            path = linear.path(layer, expert)
            if settings.adapts(linear.module, layer) and trained.has_tensor(f"{path}.weight"):
                raise UserError(
                    f"--use-dora: {path} is trained itself (--trainable), so its direction is not the adapter's alone; "
                    "legal: --trainable for other parameters; try: leave --use-dora out"
                )


def check_dense(settings: AdapterSettings, flag: str) -> None:
    """Refuse a flag about how dense linears with adapters are computed where none has one.

    Raises:
        UserError: no dense linear of the layers has one.
    """
    if not [m for m in settings.targets if m.startswith(("linear_", "shared_experts.linear_")) or m == "eh_proj"]:
        raise UserError(
            f"{flag} has no meaning for {', '.join(settings.targets)}, because experts, routers, "
            "embeddings and the output layer are computed apart; legal: with dense linears; try: leave it out"
        )


def adapted_dense_tensors(shape: ModelShape, settings: AdapterSettings) -> frozenset[str]:
    """megatron-core's names of the weights of the layers' dense linears that have an adapter."""
    dense = [linear for linear in adaptable_linears(shape) if linear.layers is not None and not linear.experts]
    return frozenset(
        f"{linear.path(layer)}.weight"
        for linear in dense
        for layer in linear.layers
        if settings.adapts(linear.module, layer)
    )


def read_pattern(words: Sequence[str] | None, flag: str, number: type[Number]) -> dict[str, Number]:
    """NAME=VALUE words.

    Raises:
        UserError: a word is not of this form, its value not a positive number, or a name stands twice.
    """
    values: dict[str, Number] = {}
    for word in words or ():
        name, _, text = word.rpartition("=")
        try:
            value = number(text)
        except ValueError:
            value = number(0)
        if not name or not 0 < value < math.inf or name in values:
            why = "the name stands twice" if name in values else f"the value is no positive {number.__name__}"
            raise UserError(f"{flag}: {word!r} is wrong, because {why}; legal: NAME=VALUE such as q_proj=8")
        values[name] = value
    return values


@dataclass(frozen=True)
class AdaptedLinear:
    """The adapters of one kind of linear in the whole model.

    Attributes:
        module: megatron-core's name.
        parts: those that have an A of their own; empty when all share one.
        count: how many of it are adapted, over layers and experts.
        ranks: of each adapted part, once where they are the same.
        scalings: likewise.
        parameters: trained, of all of them.
    """

    module: str
    parts: tuple[str, ...]
    count: int
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    parameters: int


def adapted_linears(shape: ModelShape, settings: AdapterSettings) -> list[AdaptedLinear]:
    """What the settings mean for a model, a row for each kind of linear."""
    rows = []
    for linear in adaptable_linears(shape):
        if linear.module not in settings.targets:
            continue
        parts = settings.targets[linear.module]
        chosen = parts or tuple(linear.parts)
        ranks = [settings.rank_of(linear.module, part) for part in chosen]
        each = sum(_factor_sizes(linear, settings))
        count = _adapted_layers(linear, settings) * (linear.experts or 1)
        scalings = [settings.scaling_of(linear.module, part) for part in chosen]
        rows.append(AdaptedLinear(linear.module, parts, count, _distinct(ranks), _distinct(scalings), count * each))
    return rows


def _adapted_layers(linear: Adaptable, settings: AdapterSettings) -> int:
    return len(settings.layers.get(linear.module, linear.layers or (0,)))


def _factor_sizes(linear: Adaptable, settings: AdapterSettings) -> tuple[int, int]:
    """Numbers of what has the linear's input as a side (A), and of what has its output (B and magnitudes)."""
    parts = settings.targets[linear.module]
    chosen = parts or tuple(linear.parts)
    ranks = [settings.rank_of(linear.module, part) for part in chosen]
    outs = [linear.parts[part][1] for part in chosen]
    a = linear.in_features * (sum(ranks) if parts else ranks[0])
    return a, sum(rank * out for rank, out in zip(ranks, outs)) + (sum(outs) if settings.use_dora else 0)


def local_adapter_parameters(shape: ModelShape, settings: AdapterSettings, layout: ParallelLayout) -> int:
    """Parameters of the adapters on one device, stages taken for equal: tensor parallelism cuts one factor of a
    linear's two, the one that has the side that is cut."""
    total = 0.0
    for linear in adaptable_linears(shape):
        if linear.module in settings.targets:
            a, b = _factor_sizes(linear, settings)
            tp = layout.expert_tp if linear.experts else layout.tp
            each = a / (tp if linear.cut in ("row", "vocabulary") else 1) + b / (tp if linear.cut == "column" else 1)
            total += (
                each * _adapted_layers(linear, settings) * (linear.experts or 1) / layout.ep ** bool(linear.experts)
            )
    return int(total / layout.pp)


def _distinct(values: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(values[:1] if len(set(values)) == 1 else values)


def adapter_parameters(shape: ModelShape, settings: AdapterSettings) -> int:
    """Parameters of all adapters of the model."""
    return sum(row.parameters for row in adapted_linears(shape, settings))
