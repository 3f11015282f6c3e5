"""Apex's `fused_weight_gradient_mlp_cuda`: weight gradients added to the buffer they are reduced from."""

from __future__ import annotations

from torch import Tensor


def wgrad_gemm_accum_fp32(x: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """main_grad [out, in] += grad_output [..., out]^T x [..., in], accumulated in main_grad's precision."""
    x, grad_output = x.flatten(0, -2), grad_output.flatten(0, -2)
    if x.dtype == main_grad.dtype:
        main_grad.addmm_(grad_output.t(), x)
    else:
        main_grad.add_(grad_output.t() @ x)


wgrad_gemm_accum_fp16 = wgrad_gemm_accum_fp32
