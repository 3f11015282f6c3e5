"""How the adapted linears of a built model are computed: fused or not, in how many chunks, with W + BA or without."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import nn

from mindspeed_llm.lora.function import LinearKind
from mindspeed_llm.lora.fusion.calibrate import measure
from mindspeed_llm.lora.fusion.cost import Pass, Rates, choose


def configure_fusion(
    models: Iterable[nn.Module],
    *,
    fused: bool = True,
    combine: bool = False,
    chunks: int | None = None,
    prepack: bool = False,
) -> Rates | None:
    """Set it for every adapted linear; measures the machine where the chunks are left to be chosen.

    Args:
        models: this rank's model chunks; all ranks call this with theirs.
        fused, combine, prepack: as in `LinearKind`.
        chunks: as many; None for those that the measured rates choose, pass by pass.

    Returns:
        The rates measured, None when nothing had to be.
    """
    linears = [linear for model in models for linear in adapted_linears(model)]
    rates = None
    if fused and chunks is None and (parallel := [linear for linear in linears if linear.kind.world > 1]):
        weight: torch.Tensor = parallel[0].lora_A
        rates = measure(parallel[0].kind.group, weight.dtype, weight.device)
    for linear in linears:
        how = {"fused": fused, "combine": combine, "chunks": chunks, "rates": rates, "prepack": prepack}
        linear.kind = replace(linear.kind, **how)
    return rates


def adapted_linears(model: nn.Module) -> Iterator[nn.Module]:
    """Those whose base and adapter are one function."""
    return (module for module in model.modules() if isinstance(getattr(module, "kind", None), LinearKind))


def describe(rates: Rates, models: Iterable[nn.Module], rows: int) -> list[str]:
    """Lines about the rates and the chunks they lead to.

    Args:
        rows: tokens of a micro-batch over all tensor-parallel ranks.
    """
    links = ", ".join(
        f"{form} {1e6 * link.latency:.0f} us (processor {1e6 * link.handling:.0f}) + {link.bandwidth / 1e9:.3g} GB/s"
        for form, link in (("gather", rates.gather), ("scatter", rates.scatter), ("reduce", rates.reduce))
    )
    chosen: dict[str, str] = {}
    for model in models:
        for name, linear in model.named_modules():
            if isinstance(getattr(linear, "kind", None), LinearKind) and linear.kind.world > 1:
                numbers = [choose(size, rates).chunks for size in passes(linear, rows)]
                chosen.setdefault(name.rsplit(".", 1)[-1], "/".join(map(str, numbers)))
    chunks = ", ".join(f"{name} {numbers}" for name, numbers in chosen.items())
    return [
        f" LoRA fusion: products {rates.flops / 1e9:.0f} GFLOP/s; {links}",
        f" LoRA fusion: chunks forward/backward for {rows} tokens: {chunks}",
    ]


def passes(linear: nn.Module, rows: int) -> list[Pass]:
    """Forward and backward pass of an adapted linear, as far as something is sent."""
    (rank, width), out = linear.lora_A.shape, sum(linear.part_rows.values())
    forms = {linear.kind.form(False): (width, out), linear.kind.form(True): (out, width)}
    itemsize = linear.lora_A.element_size()
    return [
        Pass(form, rows, inner, outer, rank, linear.kind.world, itemsize)
        for form, (inner, outer) in forms.items()
        if form is not None
    ]
