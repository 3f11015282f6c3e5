#!/usr/bin/env python3
"""What bf16 leaves of an adapter's effect, with and without `--lora-fusion-combine`.

    python benchmarks/lora_combine.py

A frozen weight W of standard deviation 0.02 and an adapter whose B A has entries `size` times as large, in bf16; inputs
are random, or lie in the rows of A as those that an adapter was trained on tend to. The effect is what the adapter adds
to the output, (y - x W^T); its error is the norm of what is wrong about it over the norm of the exact one (fp64), y
and x W^T being the bf16 outputs. Prints one JSON line.
"""

from __future__ import annotations

import json

import torch

from mindspeed_llm.lora.function import FrozenLinearWithAdapter, LinearKind

HIDDEN, RANK, TOKENS, SCALING = 1024, 16, 256, 2.0
SIZES = (0.1, 0.01, 0.001)


def error_of_effect(size: float, in_rows_of_a: bool, combine: bool) -> float:
    """Of one layer."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight, a, b = 0.02 * draw(HIDDEN, HIDDEN), draw(RANK, HIDDEN), draw(HIDDEN, RANK)
    b *= size * 0.02 / SCALING / (b @ a).std()
    x = draw(TOKENS, RANK) @ a / RANK**0.5 if in_rows_of_a else draw(TOKENS, HIDDEN)
    weight, a, b, x = (tensor.bfloat16() for tensor in (weight, a, b, x))
    kind = LinearKind(True, False, None, 1, SCALING, combine=combine)
    y = FrozenLinearWithAdapter.apply(x[:, None], None, weight, None, a, b, kind)[:, 0]
    exact = SCALING * (x.double() @ a.double().t()) @ b.double().t()
    return float((y.double() - (x @ weight.t()).double() - exact).norm() / exact.norm())


def main() -> None:
    """Measure and print."""
    rows = [
        {"size": size, "in_rows_of_a": inside, "apart": error_of_effect(size, inside, False)}
        | {"combined": error_of_effect(size, inside, True)}
        for size in SIZES
        for inside in (False, True)
    ]
    print(json.dumps({"results": rows}))


if __name__ == "__main__":
    main()
