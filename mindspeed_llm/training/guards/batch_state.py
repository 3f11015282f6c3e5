"""What a batch changes before any weight moves: random states and the routers' counts and score biases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mindspeed_llm.checkpoint.training_state import restore_rng_states, rng_states


@dataclass
class BatchState:
    """A point in time to which a batch can be taken back, so that it is repeated exactly or has never been.

    Copies of a few kilobytes on the host and of the routers' buffers on the device, without waiting for the device.
    """

    random_states: dict[str, Any]
    router_buffers: list[tuple[Tensor, Tensor]]

    @classmethod
    def capture(cls, buffers: list[Tensor]) -> BatchState:
        """The state before a batch.

        Args:
            buffers: the model's `router_buffers`.
        """
        return cls(rng_states(), [(buffer, buffer.clone()) for buffer in buffers])

    def restore(self) -> None:
        """Put everything back; may be called again."""
        restore_rng_states(self.random_states)
        with torch.no_grad():
            for buffer, before in self.router_buffers:
                buffer.copy_(before)


def router_buffers(chunks: list[nn.Module]) -> list[Tensor]:
    """Buffers of modules that count the tokens of their experts: what a batch changes of a model."""
    modules = [module for chunk in chunks for module in chunk.modules()]
    counting = [m for m in modules if getattr(m, "local_tokens_per_expert", None) is not None]
    return [buffer for module in counting for buffer in module.buffers(recurse=False)]
