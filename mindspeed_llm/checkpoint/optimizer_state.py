"""The state of megatron-core's optimizers as whole tensors by parameter name, whatever the layout.

Every kind of optimizer (fp32, mixed precision, distributed) gives and takes the same three tensors of a parameter's own
shape: `optimizer.state.exp_avg.<name>`, `optimizer.state.exp_avg_sq.<name>` and, in mixed precision,
`optimizer.state.fp32_param.<name>`. So a checkpoint written by one kind at one layout continues with another kind at
another layout. (megatron-core's own fully reshardable form moves values when one of several buckets ends in padding,
and asks that every rank holds a part of the state.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER = "fp32_param"


@dataclass(frozen=True)
class OwnState:
    """What this rank's optimizer holds of one model parameter.

    Attributes:
        parameter: the model's.
        main: what the optimizer updates: the parameter itself, its fp32 copy, or a slice of either; None where another
            data-parallel rank holds all of it.
        start, stop: the slice of the flattened parameter that `main` is.
        group: data-parallel ranks that hold the other slices; None where `main` is the whole parameter.
        part: the optimizer that holds it.
    """

    parameter: nn.Parameter
    main: Tensor | None
    start: int
    stop: int
    group: Any
    part: Any

    def values(self) -> dict[str, Tensor]:
        """Moments and, in mixed precision, the fp32 weights: those held here, without a copy."""
        if self.main is None:
            return {}
        state = self.part.optimizer.state[self.main]
        held = {name: state[name] for name in MOMENTS}
        return held | {MASTER: self.main.detach()} if is_mixed(self.parameter) else held

    def whole(self, name: str, wanted: bool) -> Tensor:
        """One of the values in the parameter's shape; all ranks of `group` ask together.

        Gathered ones are in host memory, one after the other, since together they are what the distributed optimizer
        saves the device from. Where the value is not wanted, zeros that take no memory.
        """
        values = self.values()
        if self.group is None:
            return values[name].view(self.parameter.shape)
        flat = torch.zeros(self.parameter.numel(), dtype=torch.float32, device=self.parameter.device)
        if self.main is not None:
            flat[self.start : self.stop] = values[name].flatten()
        dist.all_reduce(flat, group=self.group)
        flat = flat.cpu() if wanted else torch.zeros(()).expand_as(flat)
        return flat.view(self.parameter.shape)


def is_mixed(parameter: nn.Parameter) -> bool:
    """Whether the optimizer keeps fp32 weights beside this parameter."""
    return parameter.dtype != torch.float32


def optimizer_parts(optimizer: Any) -> list[Any]:
    """The optimizers of a chain that hold parameters on this rank or share theirs with one that does."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if not getattr(part, "is_stub_optimizer", False)]


def own_states(optimizer: Any) -> Iterator[OwnState]:
    """Every trained parameter with what is held of it here, in the same order on all ranks of a data-parallel group."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    for part in optimizer_parts(optimizer):
        if isinstance(part, DistributedOptimizer):
            yield from _distributed_states(part)
        elif hasattr(part, "float16_groups"):
            yield from _mixed_precision_states(part)
        else:
            yield from (_whole_state(part, p, p) for group in part.optimizer.param_groups for p in group["params"])


def _whole_state(part: Any, parameter: nn.Parameter, main: Tensor) -> OwnState:
    return OwnState(parameter, main, 0, parameter.numel(), None, part)


def _mixed_precision_states(part: Any) -> Iterator[OwnState]:
    for parameters, mains in zip(part.float16_groups, part.fp32_from_float16_groups):
        yield from (_whole_state(part, p, main) for p, main in zip(parameters, mains))
    for parameters in part.fp32_from_fp32_groups:
        yield from (_whole_state(part, p, p) for p in parameters)


def _distributed_states(part: Any) -> Iterator[OwnState]:
    for buffer in part.buffers:
        for parameter in buffer.param_index_map:
            main, start, stop = None, 0, 0
            if parameter in part.model_param_gbuf_map:
                held = part._get_model_param_range_map(parameter)["param"]
                group, order = part.model_param_group_index_map[parameter]
                main, start, stop = part.optimizer.param_groups[group]["params"][order], held.start, held.end
            yield OwnState(parameter, main, start, stop, part.data_parallel_group, part)


def sharded_optimizer_state(optimizer: Any, model_state: Mapping[str, Any], *, loading: bool) -> dict[str, Any]:
    """megatron-core's sharded tensors of the optimizer's state.

    Args:
        model_state: sharded state of the model (any nesting), holding every trained parameter.
        loading: describe what is wanted here, without gathering what is there.

    Returns:
        name on this rank -> ShardedTensor (or factory of them), whose key several local names can share: all experts
        of a layer are one tensor in the checkpoint.
    """
    from megatron.core.dist_checkpointing.mapping import is_main_replica

    allocate_moments(optimizer)
    shards = {id(sharded.data): (name, sharded) for name, sharded in _leaves(model_state)}
    state: dict[str, Any] = {}
    for own in own_states(optimizer):
        if loading and own.main is None:
            continue
        local, sharded = shards[id(own.parameter)]
        written = is_main_replica(sharded.replica_id)
        for name in (*MOMENTS, MASTER) if is_mixed(own.parameter) else MOMENTS:
            data = torch.empty(own.parameter.shape) if loading else own.whole(name, written)
            key = f"optimizer.state.{name}.{sharded.key}"
            more = {"dtype": torch.float32} if hasattr(sharded, "dtype") else {}
            state[f"{name}.{local}"] = replace(sharded, key=key, data=data.detach(), **more)
    return state


@torch.no_grad()
def load_optimizer_state(
    optimizer: Any, model_state: Mapping[str, Any], loaded: Mapping[str, Tensor], step: int
) -> None:
    """Give the optimizer what was loaded for `sharded_optimizer_state(..., loading=True)`.

    Args:
        model_state: as there.
        loaded: name on this rank -> tensor of the parameter's local shape.
        step: updates done so far, for the bias correction.
    """
    names = {id(sharded.data): name for name, sharded in _leaves(model_state)}
    for own in own_states(optimizer):
        for name, held in own.values().items():
            tensor = loaded[f"{name}.{names[id(own.parameter)]}"]
            held.view(-1).copy_(tensor.flatten()[own.start : own.stop])
    for part in optimizer_parts(optimizer):
        for state in part.optimizer.state.values():
            if "step" in state:
                state["step"] = torch.tensor(float(step), dtype=torch.float32)
        for group in part.optimizer.param_groups:
            if "step" in group:  # Apex and Transformer Engine count by group
                group["step"] = step


def optimizer_step(optimizer: Any) -> int:
    """Updates done so far, the same on every rank of the world."""
    counts = [0]
    for part in optimizer_parts(optimizer):
        counts += [int(state["step"]) for state in part.optimizer.state.values() if "step" in state]
        counts += [int(group["step"]) for group in part.optimizer.param_groups if "step" in group]
    from mindspeed_llm import accelerator

    count = torch.tensor(max(counts), device=accelerator.current().current_device())
    dist.all_reduce(count, dist.ReduceOp.MAX)
    return int(count)


def grad_scaler_state(optimizer: Any) -> dict[str, Any] | None:
    """State of the loss scale; None without one."""
    scalers = [part.grad_scaler for part in optimizer_parts(optimizer) if getattr(part, "grad_scaler", None)]
    return scalers[0].state_dict() if scalers else None


def load_grad_scaler_state(optimizer: Any, state: dict[str, Any] | None) -> None:
    """Put back what `grad_scaler_state` gave."""
    for part in optimizer_parts(optimizer):
        if state is not None and getattr(part, "grad_scaler", None):
            part.grad_scaler.load_state_dict(state)


def allocate_moments(optimizer: Any) -> None:
    """Give a fresh optimizer the moments that loading fills; torch has none before the first step."""
    for own in own_states(optimizer):
        if own.main is not None and not own.part.optimizer.state[own.main]:
            own.part.optimizer.state[own.main] = {
                "step": torch.zeros((), dtype=torch.float32),
                **{name: torch.zeros_like(own.main, dtype=torch.float32) for name in MOMENTS},
            }


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, ShardedTensor or factory) in nested dicts."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        elif hasattr(value, "replica_id") and isinstance(getattr(value, "data", None), Tensor):
            yield prefix + name, value
