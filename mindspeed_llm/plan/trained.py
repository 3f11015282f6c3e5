"""Which parameters of the model itself are trained: by regular expression, by layer, or none beside adapters."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from mindspeed_llm.checkpoint.names import EMBEDDING, OUTPUT_LAYER
from mindspeed_llm.config.training import TrainingConfig
from mindspeed_llm.errors import UserError
from mindspeed_llm.models.mapping import tensor_pairs
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.models.tensor_names import expert_index, layer_index, stacked_expert_name


@dataclass(frozen=True)
class TrainedParts:
    """What is trained of a model; a parameter is, when no selection that is given excludes it.

    `trainable` and `layers` name what is trained (everything else is not), `freeze` and `frozen_layers` what is not.
    Parameters outside the layers (embedding, final norm, head) are not among `layers`.

    Attributes:
        frozen_base: nothing is trained but what `trainable` names: adapters are.
        trainable: regular expressions (`--trainable`).
        freeze: regular expressions (`--freeze`).
        layers: numbers of layers (`--trainable-layers`); None for all, and what is outside of them.
        frozen_layers: numbers of layers (`--frozen-layers`).
    """

    frozen_base: bool = False
    trainable: tuple[str, ...] = ()
    freeze: tuple[str, ...] = ()
    layers: frozenset[int] | None = None
    frozen_layers: frozenset[int] = frozenset()

    @classmethod
    def of(cls, options: TrainingConfig, num_layers: int, *, adapted: bool) -> TrainedParts:
        """By the options of a run.

        Raises:
            UserError: layers that the model does not have, or what is no regular expression.
        """
        only, never = options.trainable_layers, options.frozen_layers
        return cls(
            adapted,
            _patterns(options.trainable, "--trainable"),
            _patterns(options.freeze, "--freeze"),
            frozenset(parse_layers(only, num_layers, "--trainable-layers")) if only else None,
            frozenset(parse_layers(never, num_layers, "--frozen-layers")) if never else frozenset(),
        )

    @property
    def everything(self) -> bool:
        """Whether all of the model is trained."""
        return self == TrainedParts()

    @property
    def selects(self) -> bool:
        """Whether an option chose what of the model is trained."""
        return self not in (TrainedParts(), TrainedParts(frozen_base=True))

    @property
    def nothing(self) -> bool:
        """Whether nothing of the model is trained: adapters alone are."""
        return self.frozen_base and not self.trainable

    def has(self, name: str) -> bool:
        """Whether a parameter is trained, by its mcore name in the whole model."""
        return self._has_one_called((name,))

    def has_tensor(self, name: str) -> bool:
        """As `has`, for a tensor that may be in a stack of all experts: a selection means it by either name."""
        return not self.nothing and self._has_one_called(_names_of(name))

    def _has_one_called(self, names: tuple[str, ...]) -> bool:
        if self.nothing:
            return False
        layer = layer_index(names[0])
        wanted = not self.trainable or any(re.search(pattern, name) for pattern in self.trainable for name in names)
        wanted &= not any(re.search(pattern, name) for pattern in self.freeze for name in names)
        return wanted and (self.layers is None or layer in self.layers) and layer not in self.frozen_layers

    def patterns_of(self, name: str) -> set[str]:
        """The regular expressions that match a name."""
        return {pattern for pattern in (*self.trainable, *self.freeze) if re.search(pattern, name)}

    def check_found(self, matched: Collection[str], some: bool) -> None:
        """Refuse a selection by what was found for it.

        Args:
            matched: regular expressions that have matched a parameter.
            some: whether anything is trained.

        Raises:
            UserError: a regular expression has matched none, or nothing is left to train.
        """
        for pattern in (*self.trainable, *self.freeze):
            if pattern not in matched:
                raise UserError(
                    f"--trainable/--freeze: {pattern!r} matches no parameter; names look like "
                    "decoder.layers.0.mlp.linear_fc1.weight"
                )
        if not some:
            raise UserError("training: every parameter is frozen; leave something to train")

    def check(self, shape: ModelShape) -> None:
        """Refuse what leaves nothing of a model to train, or a pattern that says nothing of it.

        Raises:
            UserError: no tensor of the model is trained, or a regular expression matches none.
        """
        matched, some = set(), self.frozen_base
        for name in (pair.mcore for pair in tensor_pairs(shape)):
            matched.update(*map(self.patterns_of, _names_of(name)))
            some = some or self.has_tensor(name)
        self.check_found(matched, some)


EVERYTHING = TrainedParts()


def head_name(shape: ModelShape) -> str:
    """The matrix that makes logits."""
    return EMBEDDING if shape.tie_word_embeddings else OUTPUT_LAYER


def _names_of(tensor: str) -> tuple[str, ...]:
    """A tensor's own name, and that of the stack which may hold it."""
    return (tensor,) if expert_index(tensor) is None else (tensor, stacked_expert_name(tensor))


def _patterns(texts: list[str] | None, flag: str) -> tuple[str, ...]:
    for text in texts or ():
        try:
            re.compile(text)
        except re.error as wrong:
            raise UserError(f"{flag}: {text!r} is no regular expression: {wrong}") from None
    return tuple(texts or ())


def parse_layers(text: str, num_layers: int, flag: str) -> set[int]:
    """Layer indices from `first:N`, `last:N` or a comma list with ranges like `0-3,7`.

    Raises:
        UserError: another form, or an index that the model does not have.
    """
    wrong = UserError(
        f"{flag}: {text!r} is wrong; legal: first:N, last:N or indices like 0-3,7 below {num_layers} layers"
    )
    kind, colon, count = text.partition(":")
    if colon:
        if kind not in ("first", "last") or not count.isdigit() or not 0 < int(count) <= num_layers:
            raise wrong
        layers = range(num_layers)
        return set(layers[: int(count)] if kind == "first" else layers[num_layers - int(count) :])
    chosen: set[int] = set()
    for item in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", item.strip())
        if match is None:
            raise wrong
        low, high = int(match[1]), int(match[2] or match[1])
        if low > high or high >= num_layers:
            raise wrong
        chosen.update(range(low, high + 1))
    return chosen
