"""Transformer Engine's matrix product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mindspeed_llm.models.stand_ins.transformer_engine.refusal import refuse


def general_gemm(
    a: Tensor,
    b: Tensor,
    workspace: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    quantization_params: Any = None,
    gelu: Any = None,
    gelu_in: Any = None,
    accumulate: bool = False,
    layout: str = "TN",
    out: Tensor | None = None,
    bias: Tensor | None = None,
    use_split_accumulator: bool = False,
    grad: bool = False,
    ub: Any = None,
    ub_type: Any = None,
    extra_output: Any = None,
    bulk_overlap: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Any]:
    """The product of row-major matrices in BLAS's order: TN is b a^T, NN is b a, NT is b^T a.

    Returns:
        The product in out_dtype, the bias's gradient (where `grad` and a bias are given), None, None.

    Raises:
        UserError: quantisation, a fused GELU or communication are asked for.
    """
    if quantization_params is not None or gelu or ub is not None or extra_output is not None or bulk_overlap:
        raise refuse("a matrix product with quantisation, GELU or communication", "a plain one")
    dtype = out_dtype or a.dtype
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), dtype)
    left = b.to(wide).flatten(0, -2)
    right = a.to(wide).flatten(0, -2)
    factors = {"TN": (left, right.t()), "NN": (left, right), "NT": (left.t(), right)}[layout]
    bias_grad = left.sum(0).to(bias.dtype) if grad and bias is not None else None
    # The bias is added before the sum is rounded.
    product = factors[0] @ factors[1] if grad or bias is None else torch.addmm(bias.to(wide), *factors)
    if layout != "NT":
        product = product.unflatten(0, b.shape[:-1])
    product = product.to(dtype)
    if out is not None:
        product = out.add_(product) if accumulate else out.copy_(product)
    return product, bias_grad, None, None
