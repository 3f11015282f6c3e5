"""Adapter tensors of a whole model, independent of layout: by linear and part, as PEFT names them too."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mindspeed_llm.checkpoint.names import plain_name
from mindspeed_llm.errors import UserError
from mindspeed_llm.models.layouts import layout_of
from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.plan.adaptable import Adaptable, adaptable_modules
from mindspeed_llm.plan.adapters import AdapterSettings

# What a model's own tensors begin with; optimizer, schedule and random states have other names.
MODEL_PREFIXES = ("embedding.", "decoder.", "output_layer.", "mtp.")
# What the factors of all experts of a layer are called, stacked in front (after the layers' axis, if there is one).
_STACKED_EXPERTS = ".experts.experts."


@dataclass
class PartAdapter:
    """The adapter of one part of one linear: A [r, in], B [out, r] and, for DoRA, magnitudes [out]."""

    a: Tensor
    b: Tensor
    magnitude: Tensor | None = None


AdapterTensors = dict[tuple[str, str], PartAdapter]
"""(path of the linear in the whole model, part such as "q_proj") -> its adapter; parts that share A hold equal copies.

Paths are megatron-core's with layers and experts counted over the model, such as
"decoder.layers.3.mlp.experts.local_experts.5.linear_fc1".
"""


@dataclass(frozen=True)
class Place:
    """One linear that has an adapter.

    Attributes:
        parts: those that are adapted, in the order of the rows of A where they do not share it.
        shares_a: they do.
    """

    linear: Adaptable
    layer: int
    expert: int
    parts: tuple[str, ...]
    shares_a: bool

    @property
    def path(self) -> str:
        """In the whole model."""
        return self.linear.path(self.layer, self.expert)


def adapted_places(shape: ModelShape, settings: AdapterSettings) -> Iterator[Place]:
    """Every linear of a model that has an adapter."""
    linears = adaptable_modules(shape)
    for module, chosen in settings.targets.items():
        linear = linears[module]
        for layer, expert in linear.places():
            if linear.layers is None or settings.adapts(module, layer):
                yield Place(linear, layer, expert, chosen or tuple(linear.parts), not chosen)


def read_adapters(directory: Path, shape: ModelShape, settings: AdapterSettings) -> AdapterTensors:
    """Adapters of a checkpoint written by a LoRA run, whatever its layout was.

    Raises:
        UserError: tensors are missing or of other sizes.
    """
    whole = _read_model_tensors(directory, shape.num_layers, lambda key: ".lora_" in key)
    adapters: AdapterTensors = {}
    for place in adapted_places(shape, settings):
        try:
            adapters |= _parts_of(place, whole, settings, shape)
        except KeyError as missing:
            raise UserError(
                f"lora: {directory} has no tensor {missing}; the checkpoint is incomplete; try: copy it again"
            ) from None
    check_sizes(adapters, shape, settings, str(directory))
    return adapters


def _parts_of(place: Place, whole: dict[str, Tensor], settings: AdapterSettings, shape: ModelShape) -> AdapterTensors:
    """The adapters of one linear; those of a vocabulary without its padding."""
    path, module = place.path, place.linear.module
    stacked, start, found = whole[f"{path}.lora_A"], 0, {}
    for part in place.parts:
        rank = settings.rank_of(module, part)
        a, b = stacked[start : start + rank], whole[f"{path}.lora_B.{part}"]
        start += 0 if place.shares_a else rank
        magnitude = whole[f"{path}.lora_magnitude.{part}"] if settings.use_dora else None
        if module == "word_embeddings":
            a = a[:, : shape.vocab_size]
        elif place.linear.cut == "vocabulary":
            b, magnitude = b[: shape.vocab_size], None if magnitude is None else magnitude[: shape.vocab_size]
        found[path, part] = PartAdapter(a, b, magnitude)
    return found


def read_trained_base(directory: Path, shape: ModelShape) -> dict[str, Tensor]:
    """Base tensors that a LoRA run trained beside its adapters (`--trainable`), by mcore name, unsharded and unpadded.

    They are worth as much as the adapters: whoever uses one must use the other.
    """
    whole = _read_model_tensors(directory, shape.num_layers, lambda key: ".lora_" not in key)
    trained = {plain_name(key): tensor for key, tensor in whole.items()}
    return {
        name: tensor[: shape.vocab_size] if layout_of(name).packing == "vocab" else tensor
        for name, tensor in trained.items()
    }


def _read_model_tensors(directory: Path, num_layers: int, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """The model's tensors (no optimizer state) in a torch_dist checkpoint, each layer's and expert's under its name."""
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    metadata = FileSystemReader(str(directory)).read_metadata().state_dict_metadata
    state = {
        key: torch.empty(stored.size, dtype=stored.properties.dtype)
        for key, stored in metadata.items()
        if key.startswith(MODEL_PREFIXES) and isinstance(stored, TensorStorageMetadata) and wanted(key)
    }
    load(state, storage_reader=FileSystemReader(str(directory)), no_dist=True)
    return _by_expert(_by_layer(state, num_layers))


def _by_layer(state: dict[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """megatron-core may store equal layers as one tensor with a leading layer axis; give each layer its own name."""
    whole = {}
    for key, tensor in state.items():
        if not re.match(r"decoder\.layers\.\D", key):
            whole[key] = tensor
            continue
        for layer in range(num_layers):
            whole[key.replace("decoder.layers.", f"decoder.layers.{layer}.", 1)] = tensor[layer]
    return whole


def _by_expert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Experts are one tensor with a leading axis; give each its own name."""
    whole = {}
    for key, tensor in state.items():
        if _STACKED_EXPERTS not in key:
            whole[key] = tensor
            continue
        for expert, one in enumerate(tensor):
            whole[key.replace(_STACKED_EXPERTS, f".experts.local_experts.{expert}.")] = one
    return whole


def check_sizes(adapters: AdapterTensors, shape: ModelShape, settings: AdapterSettings, origin: str) -> None:
    """Refuse adapters that are not for this model.

    Raises:
        UserError: names the first one that does not fit.
    """
    expected = {(place.path, part): place.linear for place in adapted_places(shape, settings) for part in place.parts}
    if expected.keys() != adapters.keys():
        path, part = sorted(expected.keys() ^ adapters.keys())[0]
        raise UserError(f"lora: {origin} and its settings disagree on {path} {part}")
    for (path, part), adapter in adapters.items():
        linear = expected[path, part]
        (width, out), rank = linear.parts[part], settings.rank_of(linear.module, part)
        sizes = [("A", adapter.a, (rank, width)), ("B", adapter.b, (out, rank))]
        if settings.use_dora or adapter.magnitude is not None:
            size = (out,) if settings.use_dora else None
            sizes.append(("magnitude", adapter.magnitude, size))
        for name, tensor, size in sizes:
            if (None if tensor is None else tuple(tensor.shape)) != size:
                raise UserError(
                    f"lora: {name} of {path} {part} in {origin} is {None if tensor is None else tuple(tensor.shape)}, "
                    f"and this model and rank {rank} need {size}"
                )
