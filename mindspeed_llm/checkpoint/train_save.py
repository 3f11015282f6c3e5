"""Saving and loading a training state as torch_dist: model or adapters, optimizer, schedule, random states."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from mindspeed_llm.checkpoint import directory
from mindspeed_llm.checkpoint.optimizer_state import grad_scaler_state, optimizer_step, sharded_optimizer_state
from mindspeed_llm.checkpoint.train_record import HF_FILES, iteration_directory, write_record
from mindspeed_llm.errors import UserError


def sharded_model_state(
    chunks: list[torch.nn.Module], only: list[list[str]] | None = None
) -> dict[str, dict[str, Any]]:
    """megatron-core's sharded state of the model: "model0", "model1", ... for its chunks.

    The tensors in a checkpoint are named by their layers' numbers in the whole model, so that another layout finds
    them; the names of the chunks are this process's alone.

    Args:
        chunks: the model (unwrapped), one entry per virtual stage.
        only: names of the parameters to keep in each chunk (a LoRA run keeps what it trains); None keeps everything.
    """
    state = {}
    for number, chunk in enumerate(chunks):
        full = chunk.sharded_state_dict(metadata=sharding_metadata())
        state[f"model{number}"] = {k: v for k, v in full.items() if only is None or k in set(only[number])}
    return state


def sharding_metadata() -> dict[str, Any]:
    """How megatron-core is to name and cut what it saves.

    Layers by number and not stacked: with some layers frozen, a stacked optimizer state would have holes.
    """
    from megatron.core import parallel_state

    return {
        "non_homogeneous_layers": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def training_state(
    chunks: list[torch.nn.Module],
    optimizer: Any | None,
    scheduler: Any | None,
    only: list[list[str]] | None,
    *,
    loading: bool,
    with_rng: bool = True,
) -> dict[str, Any]:
    """The tree that dist_checkpointing saves or, as a template, loads."""
    state: dict[str, Any] = sharded_model_state(chunks, only)
    if optimizer is not None:
        tensors = sharded_optimizer_state(optimizer, state, loading=loading)
        if tensors:  # a stage that trains nothing has none
            state["optimizer"] = tensors
        if not loading:
            state["optimizer_step"] = optimizer_step(optimizer)
            state["grad_scaler"] = grad_scaler_state(optimizer)
    if scheduler is not None and not loading:
        state["opt_param_scheduler"] = scheduler.state_dict()
    if with_rng:
        state["rng_state"] = sharded_rng_state()
    return state


def sharded_rng_state() -> Any:
    """This rank's random states as an object addressed by its place in the layout."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "tracker": dict(tensor_parallel.get_cuda_rng_tracker().get_states()),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    sizes = (
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_data_parallel_world_size(with_context_parallel=True),
    )
    place = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )
    return ShardedObject("rng_state", states, sizes, place)


def restore_rng_state(states: dict[str, Any]) -> None:
    """Put back what `sharded_rng_state` recorded."""
    from megatron.core import tensor_parallel

    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(states["tracker"])


def save_training(
    root: str | Path,
    iteration: int,
    state: dict[str, Any],
    record: dict[str, Any],
    hf_files: Path | None,
    *,
    keep_last: int | None = None,
    read_back: bool = False,
) -> Path:
    """Write one checkpoint: aside, then renamed, then the tracker moves.

    Args:
        state: from `training_state`.
        record: goes to mindspeed_llm.json; its keys are documented in docs/conversion.md.
        hf_files: directory whose config and tokenizer files are copied into `hf/`; None for none.
        keep_last, read_back: see `directory.complete`.

    Returns:
        The directory of the checkpoint.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    leader = dist.get_rank() == 0
    aside, final = directory.aside_of(root, iteration), iteration_directory(root, iteration)
    if leader:
        directory.begin(root, iteration)
    dist.barrier()
    with directory.discarding(aside):
        dist_checkpointing.save(state, str(aside), TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1))
        if leader:
            if hf_files is not None:
                copy_hf_files(hf_files, aside / HF_FILES)
            write_record(aside, record)
            directory.complete(aside, iteration, keep_last=keep_last, read_back=read_back)
    dist.barrier()
    return final


def copy_hf_files(source: Path, target: Path) -> None:
    """Copy config, tokenizer and generation files, everything in a model directory that is not weights or code."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        weights = file.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf") or file.name.endswith(".index.json")
        if file.is_file() and not weights and file.suffix in (".json", ".model", ".txt", ".jinja"):
            shutil.copyfile(file, target / file.name)


def load_training(directory: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Fill `state` (from `training_state(..., loading=True)`) from a torch_dist checkpoint, strictly.

    Raises:
        UserError: tensors are missing or have other shapes.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
    from megatron.core.dist_checkpointing.validation import StrictHandling

    try:
        return dist_checkpointing.load(
            state,
            str(directory),
            TorchDistLoadShardedStrategy(),
            # Ranks read what they need of the optimizer's state, which need not add up to whole tensors.
            validate_access_integrity=False,
            strict=StrictHandling.RAISE_UNEXPECTED,
        )
    except (CheckpointingException, KeyError, RuntimeError) as wrong:
        raise UserError(f"checkpoint: {directory} does not fit this model: {' '.join(str(wrong).split())}") from wrong
