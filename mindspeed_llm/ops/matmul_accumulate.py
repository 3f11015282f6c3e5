"""A weight's gradient added to its wide sum inside the matrix product: sum[o, i] += sum_r dy[r, o] x[r, i] over rows r.

The product of half-precision factors is accumulated in fp32 and never rounded to half precision in between, and no
gradient tensor of the weight's size is written and read again.
Replaces Apex's fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32, which megatron-core calls.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mindspeed_llm.ops.registry import REFERENCE, implementation, register
from mindspeed_llm.ops.row_blocks import row_blocks

# A smaller sum is added at once: the copy of 8 MB that torch makes lies in the cache, and the calls count.
LEAST_BLOCKED = 2**21


def matmul_accumulate(total: Tensor, grad: Tensor, x: Tensor) -> None:
    """Add the product to `total` in place.

    Args:
        total: [out, in], in fp32 or in the factors' type.
        grad: [..., out]; x: [..., in], over the same rows, of one type.
    """
    implementation("matmul_accumulate")(total, grad.flatten(0, -2), x.flatten(0, -2))


def add_widened(total: Tensor, part: Tensor) -> None:
    """total += part in place, for a part of a narrower type.

    torch makes a copy of the whole part in the type of the sum first. On a CPU a large one is added a few rows at a
    time, so that this copy stays in the cache.

    Args:
        total: [...], contiguous; part: of the same shape.
    """
    if total.dim() < 2 or total.numel() < LEAST_BLOCKED:
        total.add_(part)
        return
    rows, addends = total.view(total.shape[0], -1), part.flatten(1)
    for block in row_blocks(*rows.shape, rows):
        rows[block].add_(addends[block])


@register("matmul_accumulate", "torch")
def by_addmm(total: Tensor, grad: Tensor, x: Tensor) -> None:
    """One product where the types are equal; other devices than CUDA round a half-precision product once."""
    if total.dtype == x.dtype:
        total.addmm_(grad.t(), x)
    else:
        add_widened(total, grad.t() @ x)


def why_no_wide_addmm() -> str | None:
    """Why this torch cannot sum products of half-precision factors in fp32; None when it can (since 2.8)."""
    there = hasattr(torch.ops.aten.addmm, "dtype_out")
    return None if there else f"addmm of torch {torch.__version__} has no out_dtype"


@register("matmul_accumulate", "addmm_out_dtype", devices=("cuda",), priority=1, unless=why_no_wide_addmm)
def by_wide_addmm(total: Tensor, grad: Tensor, x: Tensor) -> None:
    """cuBLAS with half-precision factors and fp32 sums, as torch offers it."""
    if total.dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16):
        torch.addmm(total, grad.t(), x, out_dtype=torch.float32, out=total)
    else:
        by_addmm(total, grad, x)


@register("matmul_accumulate", REFERENCE, priority=-1)
def reference(total: Tensor, grad: Tensor, x: Tensor) -> None:
    """The formula, in the type of the sum."""
    total += torch.einsum("ro,ri->oi", grad.to(total.dtype), x.to(total.dtype))
