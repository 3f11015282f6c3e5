"""Patches of megatron.core.transformer.custom_layers.batch_invariant_kernels: its kernels in torch.

What a row becomes must not depend on the rows beside it. Libraries of matrix products choose their loops by the number
of rows, and within one product by a row's place; torch computes the last elements of an array in another way than the
others. So each row is computed for itself, in memory of its own: the same call on the same shape and alignment. It
reads the matrix once per row; the mode is for comparing, not for speed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mindspeed_llm.patching import Patch


def _row_by_row(rows: Tensor, width: int, function: Callable[[Tensor], Tensor]) -> Tensor:
    """function(row [k]) -> [width] of each of rows [m, k], in the rows' type; computed in fp32 at least."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    out = rows.new_empty(rows.shape[0], width)
    for index, row in enumerate(rows):
        # torch's allocator aligns what it makes; a row within a matrix lies anywhere.
        out[index] = function(row.to(wide, copy=True))
    return out


def _product_of_rows(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def matmul_persistent(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        if a.is_cuda:
            return original(a, b, bias)
        if a.shape[1] != b.shape[0] or a.dtype != b.dtype or (bias is not None and bias.dim() != 1):
            raise ValueError(
                f"a {a.dtype} {list(a.shape)} cannot be multiplied with b {b.dtype} {list(b.shape)}"
                + ("" if bias is None else f" and have bias {list(bias.shape)} added")
            )
        # Not through mm or addmm, which batch-invariant mode redirects to this function.
        transposed = b.t().to(torch.promote_types(b.dtype, torch.float32))
        added = None if bias is None else bias.to(transposed.dtype)

        def product(row: Tensor) -> Tensor:
            out = torch.mv(transposed, row)
            return out if added is None else out.add_(added)

        return _row_by_row(a, b.shape[1], product)

    return matmul_persistent


def _log_softmax_of_rows(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def of_row(row: Tensor) -> Tensor:
        row = row - row.max()
        return row - row.exp().sum().log()

    @functools.wraps(original)
    def log_softmax(input: Tensor, dim: int = -1) -> Tensor:
        if input.is_cuda:
            return original(input, dim)
        if dim not in (-1, input.ndim - 1):
            raise ValueError(f"dim is {dim}; legal: -1 or {input.ndim - 1}, the last one")
        return _row_by_row(input.reshape(-1, input.shape[-1]), input.shape[-1], of_row).view(input.shape)

    return log_softmax


def _mean_of_rows(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def mean_dim(input: Tensor, dim: int, keepdim: bool = False, dtype: torch.dtype | None = None) -> Tensor:
        if input.is_cuda:
            return original(input, dim, keepdim, dtype)
        if not -input.ndim <= dim < input.ndim:
            raise ValueError(f"dim is {dim}; legal: {-input.ndim} to {input.ndim - 1}")
        whole = input.dtype if input.is_floating_point() else torch.float32
        rows = input.to(dtype or whole).movedim(dim, -1)
        flat = rows.reshape(-1, rows.shape[-1])
        means = _row_by_row(flat, 1, lambda row: row.sum() / len(row)).view(*rows.shape[:-1], 1)
        return means.movedim(-1, dim) if keepdim else means.squeeze(-1)

    return mean_dim


def _as_the_module_imports(original: Callable[[str], Any]) -> Callable[[str], Any]:
    from megatron.core.transformer.custom_layers import batch_invariant_kernels

    @functools.wraps(original)
    def import_if_available(name: str) -> Any:
        try:
            # With something asked for from it, `__import__` gives the module itself and not its first package.
            return __import__(name, vars(batch_invariant_kernels), fromlist=("__name__",))
        except ModuleNotFoundError:
            return None

    return import_if_available


MODULE = "megatron.core.transformer.custom_layers.batch_invariant_kernels"


def _patch(name: str, function: str, wrap: Callable[..., Any], fingerprint: str, why: str | None = None) -> Patch:
    return Patch(
        name=name,
        target=f"{MODULE}:{function}",
        why=why or "it is a Triton kernel, which runs on CUDA alone",
        wrap=wrap,
        versions=">=0.16",
        fingerprints={"0.16.1": fingerprint},
        needs="triton",
    )


PATCHES = (
    _patch("batch-invariant-product", "matmul_persistent", _product_of_rows, "e84943eeb522"),
    _patch("batch-invariant-log-softmax", "log_softmax", _log_softmax_of_rows, "ed09d8f3497d"),
    _patch("batch-invariant-mean", "mean_dim", _mean_of_rows, "2ad8799d446c"),
    _patch(
        "batch-invariant-mode-ends",
        "_import_module_if_available",
        _as_the_module_imports,
        "81a25ed11d6c",
        why="it asks importlib for Transformer Engine, which knows nothing of what stands in for it; leaving the mode "
        "then fails",
    ),
)
