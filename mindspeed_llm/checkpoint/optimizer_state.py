"""The state of megatron-core's optimizers by parameter name, whatever the layout.

Every kind of optimizer (fp32, mixed precision, distributed) gives and takes parts of the same three tensors of a
parameter's own shape: `optimizer.state.exp_avg.<name>`, `optimizer.state.exp_avg_sq.<name>` and, in mixed precision,
`optimizer.state.fp32_param.<name>`. So a checkpoint written by one kind at one layout continues with another kind at
another layout. (megatron-core's own fully reshardable form moves values when one of several buckets ends in padding,
and asks that every rank holds a part of the state.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mindspeed_llm.checkpoint.boxes import Box, sharded_leaves, slice_boxes
from mindspeed_llm.parallel.shards import Shard, shard_of

MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER = "fp32_param"


class StateElsewhere(Protocol):
    """State that does not lie in the optimizer's own tensors: what its attribute `elsewhere` is then."""

    def settle(self) -> None:
        """Wait until the tensors of the optimizer's `state` have what the last step computed."""

    def master(self, main: Tensor) -> Tensor:
        """The fp32 weights of one of the optimizer's tensors, in its shape, to read and to write; maybe a copy."""

    def accept(self, main: Tensor, values: Tensor) -> None:
        """`master` gave this, and it has been written to."""

    def device_tensors(self) -> Iterator[Tensor]:
        """What of the state is on the device."""


@dataclass(frozen=True)
class OwnState:
    """What this rank's optimizer holds of one model parameter.

    Attributes:
        parameter: the model's.
        main: what the optimizer updates: the parameter itself, its fp32 copy, or a slice of either; None where another
            data-parallel rank holds all of it.
        start, stop: the slice of the flattened parameter that `main` is.
        is_slice: data-parallel ranks hold the other slices; otherwise they all hold the whole.
        part: the optimizer that holds it.
    """

    parameter: nn.Parameter
    main: Tensor | None
    start: int
    stop: int
    is_slice: bool
    part: Any

    def values(self) -> dict[str, Tensor]:
        """Moments and, in mixed precision, the fp32 weights: those held here, to save from and to load into.

        What is written to them counts after `accept`.
        """
        if self.main is None:
            return {}
        if self.elsewhere is not None:
            self.elsewhere.settle()
        state = self.part.optimizer.state[self.main]
        held = {name: state[name] for name in MOMENTS}
        if is_mixed(self.parameter):
            held[MASTER] = self.main.detach() if self.elsewhere is None else self.elsewhere.master(self.main)
        return held

    def outlines(self) -> dict[str, Tensor]:
        """Tensors like those of `values`, without values and memory: what is elsewhere is not put together for it."""
        if self.main is None:
            return {}
        state = self.part.optimizer.state[self.main]
        held = {name: torch.empty_like(state[name], device="meta") for name in MOMENTS}
        if is_mixed(self.parameter):
            held[MASTER] = torch.empty(self.main.shape, dtype=torch.float32, device="meta")
        return held

    def accept(self, values: dict[str, Tensor]) -> None:
        """Take what has been written to the tensors that `values` gave."""
        if self.elsewhere is not None and MASTER in values:
            self.elsewhere.accept(self.main, values[MASTER])

    @property
    def elsewhere(self) -> StateElsewhere | None:
        """What holds the state, unless the optimizer's own tensors do."""
        return getattr(self.part.optimizer, "elsewhere", None)


def is_mixed(parameter: nn.Parameter) -> bool:
    """Whether the optimizer keeps fp32 weights beside this parameter, or in its place where it is cut."""
    shard = shard_of(parameter)
    return (parameter.dtype if shard is None else shard.compute_dtype) != torch.float32


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
        elif hasattr(part, "shards"):
            yield from (_shard_state(part, shard) for shard in part.shards)
        else:
            yield from (_whole_state(part, p, p) for group in part.optimizer.param_groups for p in group["params"])


def _whole_state(part: Any, parameter: nn.Parameter, main: Tensor) -> OwnState:
    return OwnState(parameter, main, 0, parameter.numel(), False, part)


def _shard_state(part: Any, shard: Shard) -> OwnState:
    main = shard.main if shard.main.numel() else None
    return OwnState(shard.parameter, main, shard.start, shard.stop, True, part)


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
            yield OwnState(parameter, main, start, stop, True, part)


def optimizer_boxes(
    optimizer: Any, model_state: Mapping[str, Any], replicas: Callable[[Tensor], int], outlines: bool = False
) -> tuple[list[Box], list[Callable[[], None]]]:
    """What this rank's optimizer holds, as boxes on its memory: the same to save from and to load into.

    Args:
        model_state: megatron-core's sharded state of the model (any nesting), holding every trained parameter.
        replicas: how many data-parallel ranks hold the same of a parameter.
        outlines: the boxes are only asked for their sizes, so they need no memory behind them.

    Returns:
        The boxes, and what is to be called when they have been filled.
    """
    allocate_moments(optimizer)
    shards = {id(sharded.data): sharded for _, sharded in sharded_leaves(model_state)}
    boxes: list[Box] = []
    accepting: list[Callable[[], None]] = []
    for own in own_states(optimizer):
        sharded, values = shards[id(own.parameter)], own.outlines() if outlines else own.values()
        accepting.append(partial(own.accept, values))
        for name, held in values.items():
            key = f"optimizer.state.{name}.{sharded.key}"
            same = None if own.is_slice else replicas(own.parameter)
            boxes += slice_boxes(sharded, key, held, own.start, own.stop, same)
    return boxes, accepting


def optimizer_step(optimizer: Any) -> int:
    """Updates done so far by this rank's optimizer; 0 where it trains nothing."""
    counts = [0]
    for part in optimizer_parts(optimizer):
        counts += [int(state["step"]) for state in part.optimizer.state.values() if "step" in state]
        counts += [int(group["step"]) for group in part.optimizer.param_groups if "step" in group]
    return max(counts)


def set_optimizer_step(optimizer: Any, step: int) -> None:
    """Set the updates done so far, for the bias correction."""
    for part in optimizer_parts(optimizer):
        if counts_by_parameter(part.optimizer):
            for state in part.optimizer.state.values():
                device = state["step"].device if "step" in state else None
                state["step"] = torch.tensor(float(step), dtype=torch.float32, device=device)
        else:  # whether a count is there or not: a fresh optimizer has none
            for group in part.optimizer.param_groups:
                group["step"] = step


def grad_scaler_state(optimizer: Any) -> dict[str, Any] | None:
    """State of the loss scale as plain values; None without one."""
    scalers = [part.grad_scaler for part in optimizer_parts(optimizer) if getattr(part, "grad_scaler", None)]
    if not scalers:
        return None
    return {name: v.tolist() if isinstance(v, Tensor) else v for name, v in scalers[0].state_dict().items()}


def load_grad_scaler_state(optimizer: Any, state: dict[str, Any] | None) -> None:
    """Put back what `grad_scaler_state` gave."""
    for part in optimizer_parts(optimizer):
        if state and getattr(part, "grad_scaler", None):
            scale = torch.as_tensor(state["scale"], dtype=torch.float32)
            part.grad_scaler.load_state_dict(state | {"scale": scale})


def counts_by_parameter(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer keeps its updates in each parameter's state (torch), not in the group (Apex, TE)."""
    return isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)


def allocate_moments(optimizer: Any) -> None:
    """Give a fresh optimizer the moments that loading fills; torch has none before the first step."""
    for own in own_states(optimizer):
        if own.main is not None and not own.part.optimizer.state[own.main]:
            state = {name: torch.zeros_like(own.main, dtype=torch.float32) for name in MOMENTS}
            if counts_by_parameter(own.part.optimizer):
                state["step"] = torch.zeros((), dtype=torch.float32)
            own.part.optimizer.state[own.main] = state
