"""A batch computed twice: a device that gives another result for the same numbers is broken, and says nothing itself.

megatron-core's counterpart is its rerun state machine (`--rerun-mode validate_results`).
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_llm import accelerator
from mindspeed_llm.errors import UserError
from mindspeed_llm.parallel.shards import local_gradient
from mindspeed_llm.plan.plan import Plan
from mindspeed_llm.training.guards.batch_state import BatchState
from mindspeed_llm.training.guards.bits import hash_all
from mindspeed_llm.training.setup import TrainingModel, placement
from mindspeed_llm.training.step import BatchResult

SHOWN = 3


class Repeating:
    """Runs batches twice and compares losses and gradients of this rank, before they are mixed with those of others."""

    def __init__(self, plan: Plan, model: TrainingModel) -> None:
        self.plan, self.model = plan, model
        self.parameters = [
            (placement(plan, number).global_name(local), parameter)
            for number, chunk in enumerate(model.chunks)
            for local, parameter in chunk.named_parameters()
            if parameter.requires_grad
        ]

    def run(self, batch: Callable[[], BatchResult], state: BatchState, where: str) -> BatchResult:
        """`batch()` twice from the same random state; the second result, whose gradients are in the model.

        Raises:
            UserError: the two differ on some rank; on all ranks.
        """
        (_, first), (result, second) = self._once(batch), self._again(batch, state)
        differing = torch.nonzero(first != second).reshape(-1).tolist()
        flags = torch.tensor([len(differing)], device=accelerator.current().current_device())
        dist.all_reduce(flags)
        if int(flags):
            raise UserError(self._describe(differing, where))
        return result

    def _again(self, batch: Callable[[], BatchResult], state: BatchState) -> tuple[BatchResult, Tensor]:
        state.restore()
        for wrapped in self.model.wrapped:
            wrapped.zero_grad_buffer()
        return self._once(batch)

    def _once(self, batch: Callable[[], BatchResult]) -> tuple[BatchResult, Tensor]:
        """The result and [1 + parameters] hashes of this rank's losses and gradients."""
        with self._before_reduction() as hashes:
            result = batch()
        device = accelerator.current().current_device()
        losses = [loss.to(device) for loss in result.own_losses]
        return result, torch.cat([hash_all([torch.stack(losses)] if losses else [], device), hashes[0]])

    @contextmanager
    def _before_reduction(self) -> Iterator[list[Tensor]]:
        """Hashes of the gradients at the end of the backward pass, before replicas are summed.

        (With --overlap-grad-reduce some are summed by then, and with --use-torch-fsdp2 all: a fault on one rank shows
        on its peers as well.)
        """
        found: list[Tensor] = []
        configs = {id(chunk.config): chunk.config for chunk in self.model.chunks}
        before = {key: config.finalize_model_grads_func for key, config in configs.items()}

        def finalize(function: Callable[..., None]) -> Callable[..., None]:
            def hashing(*args: Any, **named: Any) -> None:
                gradients = [local_gradient(parameter) for _, parameter in self.parameters]
                found.append(hash_all(gradients, accelerator.current().current_device()))
                function(*args, **named)

            return hashing

        for key, config in configs.items():
            config.finalize_model_grads_func = finalize(before[key])
        try:
            yield found
        finally:
            for key, config in configs.items():
                config.finalize_model_grads_func = before[key]

    def _describe(self, differing: list[int], where: str) -> str:
        """The line that names ranks and what they computed differently."""
        names = [*self._loss_names, *(f"the gradient of {name}" for name, _ in self.parameters)]
        everybody: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everybody, (socket.gethostname(), [names[i] for i in differing]))
        said = [
            f"rank {rank} on {host}: {', '.join(what[:SHOWN])}{', ...' if len(what) > SHOWN else ''}"
            for rank, (host, what) in enumerate(everybody)
            if what
        ]
        return (
            f"repeated batch: another result at {where}, because a device computed wrongly once or its kernels are not "
            f"deterministic; {'; '.join(said)}; weights are unchanged; legal: the same bits; try: resume from the last "
            "checkpoint without that host"
        )

    @property
    def _loss_names(self) -> list[str]:
        from megatron.core import parallel_state

        return ["the loss"] if parallel_state.is_pipeline_last_stage(ignore_virtual=True) else []
