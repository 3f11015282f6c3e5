"""What a rank holds of a parameter that is cut over the data-parallel ranks."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_SHARD = "mindspeed_llm_shard"


@dataclass(frozen=True)
class Shard:
    """This rank's part of a parameter: rows of its first dimension, so one slice of the flattened tensor.

    Attributes:
        parameter: what the module has outside of its passes, a DTensor of the whole shape.
        main: the values held here, as a tensor of their own that the optimizer updates in place.
        start, stop: the slice; empty on the last ranks where the first dimension is short.
        compute_dtype: of the products, to which the values are rounded when they are gathered.
    """

    parameter: nn.Parameter
    main: nn.Parameter
    start: int
    stop: int
    compute_dtype: torch.dtype

    @property
    def gradient(self) -> Tensor | None:
        """The reduced gradient of these values, live; None before the first backward pass."""
        return None if self.parameter.grad is None else self.parameter.grad._local_tensor

    def announce(self) -> None:
        """Let `shard_of` find this by the parameter."""
        setattr(self.parameter, _SHARD, self)


def shard_of(parameter: Any) -> Shard | None:
    """This rank's part of a parameter that is cut; None of any other."""
    return getattr(parameter, _SHARD, None)


def shards_of(wrapped: nn.Module) -> Collection[Shard]:
    """All shards of a model in its wrapper for data parallelism; none where that cuts nothing."""
    return wrapped.shards.values() if hasattr(wrapped, "shards") else ()


def local_values(parameter: nn.Parameter) -> Tensor:
    """What this rank holds of a parameter, cut or not; live."""
    shard = shard_of(parameter)
    return parameter.detach() if shard is None else shard.main.detach()


def local_gradient(parameter: nn.Parameter) -> Tensor:
    """This rank's accumulated gradient of a trained parameter, cut or not; live."""
    shard = shard_of(parameter)
    return parameter.main_grad if shard is None else shard.gradient


def gathered_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """What parameters that are cut are while they are gathered, one unit after another; collective, between two passes.

    They are the same tensors in every pass, without memory in between. A module that is not cut has none.
    """
    for part in module.modules():
        if hasattr(part, "unshard"):
            part.unshard()
            yield from (parameter for parameter in part.parameters() if shard_of(parameter) is None)
            part.reshard()
