"""Initial factors of adapters, which depend on the seed and the linear's name alone, not on how the model is cut up."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor


def initial_a(name: str, ranks: Mapping[str, int], in_features: int, seed: int) -> Tensor:
    """A of one linear as PEFT draws it (Kaiming uniform with a = sqrt(5): within 1 / sqrt(in)), not cut: [k r, in].

    Args:
        name: of the linear in the whole model.
        ranks: of each part, or {"all": rank} where the parts share A.
    """
    return torch.cat([draw_uniform(seed, f"{name}.lora_A/{part}", (r, in_features)) for part, r in ranks.items()])


def draw_uniform(seed: int, name: str, shape: tuple[int, int]) -> Tensor:
    """fp32 numbers uniform within 1 / sqrt(columns), the same whatever else is drawn."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    bound = 1.0 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
