"""How many tokens every expert gets: the routers' choices of one global batch, padding left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from mindspeed_llm import accelerator
from mindspeed_llm.models.moe.router import Router
from mindspeed_llm.training.monitor.places import PlacedChunk, Places


class ExpertLoad:
    """Counts in the forward passes of the iterations that `recording` is set for.

    Args:
        chunks: of this rank.
    """

    def __init__(self, chunks: Sequence[PlacedChunk], places: Places, num_experts: int) -> None:
        self.recording = False
        self.layers = {place: places.names[place] for place in places.with_experts}
        device = accelerator.current().current_device()
        self.counts = torch.zeros(len(self.layers), num_experts, dtype=torch.int64, device=device)
        self._hooks = [
            router.register_forward_hook(self._counter(places.with_experts.index(place)), with_kwargs=True)
            for chunk in chunks
            for place, router in chunk.modules(Router)
        ]

    def _counter(self, place: int) -> Any:
        def count(router: torch.nn.Module, inputs: tuple, named: dict[str, Any], output: tuple) -> None:
            # A recomputed layer runs twice; once with gradients.
            if not (self.recording and router.training and torch.is_grad_enabled()):
                return
            chosen = output[1].detach()
            padding = named.get("padding_mask", inputs[1] if len(inputs) > 1 else None)
            if padding is not None:
                chosen = chosen & ~padding.reshape(-1, 1)
            self.counts[place] += chosen.sum(dim=0)

        return count

    def measure(self) -> tuple[dict[str, float], dict[str, list[int]]]:
        """(figures by name, tokens of every expert by layer), of all ranks; a collective call that starts anew.

        `expert-load/...` are the tokens of the busiest expert over the mean of all: 1 is even.
        """
        dist.all_reduce(self.counts)
        tokens = self.counts.tolist()
        self.counts.zero_()
        by_layer = dict(zip(self.layers.values(), tokens))
        ratios = {layer: max(row) * len(row) / sum(row) if sum(row) else 1.0 for layer, row in by_layer.items()}
        found = {"expert-load": max(ratios.values())}
        return found | {f"expert-load/{layer}": ratio for layer, ratio in ratios.items()}, by_layer

    def close(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()
