"""Where in the model a tensor or module belongs: a layer, a prediction layer, the embedding, the output layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mindspeed_llm.models import tensor_names
from mindspeed_llm.models.shape import ModelShape

# Part of the model -> how its tensors' names begin; all others belong to a layer.
OUTSIDE_LAYERS = {"embedding": "embedding.", "final-layernorm": "decoder.final_layernorm.", "output": "output_layer."}


@dataclass(frozen=True)
class Places:
    """The parts of a model in the order of their numbers.

    Attributes:
        names: layers, counted from 1, prediction layers, and what is outside of layers.
        with_experts: numbers of the layers whose MLP has experts.
    """

    names: tuple[str, ...]
    num_layers: int
    num_attentions: int
    with_experts: tuple[int, ...]

    @classmethod
    def of(cls, shape: ModelShape) -> Places:
        """The parts of a model of this shape."""
        layers = [f"layer-{number + 1}" for number in range(shape.num_layers)]
        predictions = [f"mtp-layer-{number + 1}" for number in range(shape.mtp_num_layers)]
        count = len(layers) + len(predictions)
        experts = tuple(number for number in range(count) if shape.is_moe_layer(number))
        return cls((*layers, *predictions, *OUTSIDE_LAYERS), len(layers), count, experts)

    def number(self, name: str) -> int:
        """Number of the part that a parameter or module belongs to, by its name in the whole model."""
        if (layer := tensor_names.layer_index(name)) is not None:
            return layer
        if tensor_names.is_mtp(name):
            return self.num_layers + int(name.split(".")[2])
        return self.names.index(next(part for part, prefix in OUTSIDE_LAYERS.items() if name.startswith(prefix)))


@dataclass(frozen=True)
class PlacedChunk:
    """A model chunk of this rank that knows which layers of the whole model it holds.

    Attributes:
        wrapped: inside megatron-core's DistributedDataParallel.
        layers: number in the whole model of each local layer.
    """

    wrapped: torch.nn.Module
    layers: tuple[int, ...]
    places: Places

    def number(self, local_name: str) -> int:
        """As `Places.number`, by the name in the chunk."""
        layer = tensor_names.layer_index(local_name)
        return self.places.number(local_name) if layer is None else self.layers[layer]

    def parameters(self) -> Iterator[tuple[int, torch.nn.Parameter]]:
        """(number of its part, parameter) of the chunk."""
        for name, parameter in self.wrapped.module.named_parameters():
            yield self.number(name), parameter

    def modules(self, kind: type[torch.nn.Module]) -> Iterator[tuple[int, torch.nn.Module]]:
        """(number of its part, module) of all modules of a kind."""
        for name, module in self.wrapped.module.named_modules():
            if isinstance(module, kind):
                yield self.number(name + "."), module
