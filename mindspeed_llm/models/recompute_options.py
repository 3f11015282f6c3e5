"""In how many layers parts are computed once more in the backward pass; no megatron here."""

from __future__ import annotations

import sys
from dataclasses import dataclass

ALL_LAYERS = sys.maxsize


@dataclass(frozen=True)
class RecomputeOptions:
    """In how many layers of a pipeline chunk each part is recomputed, counted behind those recomputed as a whole.

    Attributes:
        norm: the norms before attention and MLP.
        activation: activation functions of MLPs, experts and shared experts.
        expert_activation: those of routed experts alone.
        experts: routed experts from the tokens sent to them on.
        expert_layer: all of a layer's expert part, with what it sends.
        latent: "" for nothing, "up" to recompute latent attention from its latents, "all" from its input.
        per_rank: numbers are those of a pipeline rank, not of a chunk.
    """

    norm: int = 0
    activation: int = 0
    expert_activation: int = 0
    experts: int = 0
    expert_layer: int = 0
    latent: str = ""
    per_rank: bool = False

    @property
    def anything(self) -> bool:
        """Whether a part of any layer is recomputed."""
        counts = (self.norm, self.activation, self.expert_activation, self.experts, self.expert_layer)
        return any(counts) or bool(self.latent)
