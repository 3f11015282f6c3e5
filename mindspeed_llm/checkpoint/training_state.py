"""What a checkpoint of a training run consists of on this rank: boxes, objects, and plain values."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from mindspeed_llm import accelerator
from mindspeed_llm.checkpoint.boxes import Box, own_share, sharded_leaves, slice_boxes, tensor_boxes
from mindspeed_llm.checkpoint.optimizer_state import grad_scaler_state, is_mixed, optimizer_boxes, optimizer_step
from mindspeed_llm.checkpoint.write_part import bytes_of_part, saved_bytes
from mindspeed_llm.parallel.shards import shard_of


@dataclass
class TrainingState:
    """One rank's part of a training state, the same to save from and to load into.

    Attributes:
        boxes: everything this rank holds, replicas of others' included; views of the live tensors, `rounded` excepted.
        objects: unique key -> object, of this rank alone.
        placeholders: unique keys of objects that hold nothing: megatron-core's linears ask for the state that those of
            Transformer Engine have.
        common: plain values that all ranks know alike.
        facts: values that a rank knows, or not (None): see `merge_facts`.
        rounded: (16-bit copy in the boxes, fp32 values it stands for) of weights that are cut and held in fp32 alone.
        filled: what is to be called when the optimizer's boxes have been filled.
    """

    boxes: list[Box]
    objects: dict[str, Any] = field(default_factory=dict)
    placeholders: list[str] = field(default_factory=list)
    common: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    rounded: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    filled: list[Callable[[], None]] = field(default_factory=list)

    def own_boxes(self) -> list[Box]:
        """The boxes that this rank writes when all ranks are there."""
        return own_share(self.boxes)

    def take_rounded(self) -> None:
        """Let what was loaded without an optimizer's fp32 weights be the weights."""
        for loaded, weights in self.rounded:
            weights.copy_(loaded)

    def packed_objects(self) -> dict[str, bytes]:
        """All objects as megatron-core stores them."""
        packed = {key: saved_bytes([value]) for key, value in self.objects.items()}
        return packed | dict.fromkeys(self.placeholders, saved_bytes([None]))


def training_state(
    chunks: list[torch.nn.Module],
    optimizer: Any | None,
    scheduler: Any | None,
    only: list[list[str]] | None,
    *,
    rng: Mapping[str, Any] | None = None,
    outlines: bool = False,
) -> TrainingState:
    """Describe what this rank holds; copies nothing and needs no other rank.

    Args:
        chunks: the model (unwrapped), one entry per virtual stage.
        optimizer, scheduler: None leaves them out.
        only: names of the parameters to keep in each chunk (a LoRA run keeps what it trains); None keeps everything.
        rng: random states to save (`rng_states`); None leaves them out.
        outlines: the optimizer's boxes have sizes and no values.
    """
    model = sharded_model_state(chunks, only)
    state = TrainingState([])
    for _, sharded in sharded_leaves(model):
        state.boxes += _weight_boxes(sharded, state.rounded)
    state.placeholders = placeholder_keys(model)
    if optimizer is not None:
        boxes, state.filled = optimizer_boxes(optimizer, model, data_replicas, outlines)
        state.boxes += boxes
        state.facts = {"optimizer_step": optimizer_step(optimizer), "grad_scaler": grad_scaler_state(optimizer)}
    if scheduler is not None:
        state.common["opt_param_scheduler"] = scheduler.state_dict()
    if rng is not None:
        state.objects[rng_key()] = dict(rng)
    return state


def _weight_boxes(sharded: Any, rounded: list[tuple[torch.Tensor, torch.Tensor]]) -> list[Box]:
    """The boxes of a weight or buffer: all of it, or the part that is held here of one that is cut."""
    shard = shard_of(sharded.data)
    if shard is None:
        return tensor_boxes(sharded, data_replicas(sharded.data))
    held = shard.main.detach()
    if is_mixed(shard.parameter) and shard.parameter.requires_grad:
        rounded.append((held.to(shard.compute_dtype), held))
        held = rounded[-1][0]
    return slice_boxes(sharded, sharded.key, held, shard.start, shard.stop, None) if held.numel() else []


def data_replicas(parameter: torch.Tensor) -> int:
    """How many data-parallel ranks hold the same of a parameter; there are fewer of an expert's."""
    from megatron.core import parallel_state

    if getattr(parameter, "allreduce", True):
        return parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    return parallel_state.get_expert_data_parallel_world_size()


def merge_facts(facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One value of what several ranks say: a stage that trains nothing has counted no updates and scales no loss."""
    if not any(facts):
        return {}
    scalers = [found["grad_scaler"] for found in facts if found.get("grad_scaler") is not None]
    return {
        "optimizer_step": max(found.get("optimizer_step", 0) for found in facts),
        "grad_scaler": scalers[0] if scalers else None,
    }


def bytes_to_write(state: TrainingState) -> int:
    """Bytes of data that this rank adds to a checkpoint, exactly; the index of all ranks comes on top."""
    return bytes_of_part(state.own_boxes(), state.packed_objects())


def sharded_model_state(
    chunks: list[torch.nn.Module], only: list[list[str]] | None = None
) -> dict[str, dict[str, Any]]:
    """megatron-core's sharded state of the model: "model0", "model1", ... for its chunks.

    Of a chunk whose parameters are cut over the data-parallel ranks it is the one from before that.

    The tensors in a checkpoint are named by their layers' numbers in the whole model, so that another layout finds
    them; the names of the chunks are this process's alone.

    Args:
        chunks, only: as for `training_state`.
    """
    state = {}
    for number, chunk in enumerate(chunks):
        full = getattr(chunk, "lasting_sharded_state", None) or chunk.sharded_state_dict(metadata=sharding_metadata())
        state[f"model{number}"] = {k: v for k, v in full.items() if only is None or k in set(only[number])}
    return state


def placeholder_keys(model_state: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Unique keys of the objects in a model's sharded state, none of which holds anything."""
    objects = [v for chunk in model_state.values() for v in chunk.values() if hasattr(v, "unique_key")]
    assert all(sharded.data is None for sharded in objects), f"state of modules is no tensor: {objects[:3]}"
    return [sharded.unique_key for sharded in objects]


def sharding_metadata() -> dict[str, Any]:
    """How megatron-core is to name and cut what it saves.

    Layers by number and not stacked: with some layers frozen, a stacked optimizer state would have holes.
    """
    from megatron.core import parallel_state

    return {
        "non_homogeneous_layers": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def rng_states() -> dict[str, Any]:
    """This process's random states, as tensors and plain values."""
    from megatron.core import tensor_parallel

    kind, keys, *rest = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "tracker": dict(tensor_parallel.get_cuda_rng_tracker().get_states()),
    }
    device = accelerator.current()
    if device.device_type != "cpu":
        states[device.device_type] = device.generator().get_state()
    return states


def restore_rng_states(states: Mapping[str, Any]) -> None:
    """Put back what `rng_states` gave."""
    from megatron.core import tensor_parallel

    kind, keys, *rest = states["numpy"]
    random.setstate(states["python"])
    np.random.set_state((kind, np.asarray(keys).astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    device = accelerator.current()
    if device.device_type in states:
        device.generator().set_state(states[device.device_type])
    tensor_parallel.get_cuda_rng_tracker().set_states(dict(states["tracker"]))


def rng_key() -> str:
    """Name of this rank's random states in a checkpoint: its place in the layout."""
    from megatron.core import parallel_state as p

    sizes = (
        p.get_pipeline_model_parallel_world_size(),
        p.get_tensor_model_parallel_world_size(),
        p.get_data_parallel_world_size(with_context_parallel=True),
    )
    place = (
        p.get_pipeline_model_parallel_rank(),
        p.get_tensor_model_parallel_rank(),
        p.get_data_parallel_rank(with_context_parallel=True),
    )
    return f"rng_state/shard_{'.'.join(map(str, place))}_{'.'.join(map(str, sizes))}"
