"""What a batch changes before any weight moves: random states and the routers' counts and score biases."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


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
        from megatron.core import tensor_parallel

        states = {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "torch": torch.get_rng_state(),
            "tracker": {k: _copy(v) for k, v in tensor_parallel.get_cuda_rng_tracker().get_states().items()},
        }
        if torch.cuda.is_available():
            states["cuda"] = torch.cuda.get_rng_state()
        return cls(states, [(buffer, buffer.clone()) for buffer in buffers])

    def restore(self) -> None:
        """Put everything back; may be called again."""
        from megatron.core import tensor_parallel

        random.setstate(self.random_states["python"])
        np.random.set_state(self.random_states["numpy"])
        torch.set_rng_state(self.random_states["torch"])
        if "cuda" in self.random_states:
            torch.cuda.set_rng_state(self.random_states["cuda"])
        copies = {k: _copy(v) for k, v in self.random_states["tracker"].items()}
        tensor_parallel.get_cuda_rng_tracker().set_states(copies)
        with torch.no_grad():
            for buffer, before in self.router_buffers:
                buffer.copy_(before)


def _copy(state: Any) -> Any:
    return state.clone() if isinstance(state, Tensor) else state


def router_buffers(chunks: list[nn.Module]) -> list[Tensor]:
    """Buffers of modules that count the tokens of their experts: what a batch changes of a model."""
    modules = [module for chunk in chunks for module in chunk.modules()]
    counting = [m for m in modules if getattr(m, "local_tokens_per_expert", None) is not None]
    return [buffer for module in counting for buffer in module.buffers(recurse=False)]
