"""Apex's `fused_weight_gradient_mlp_cuda`: weight gradients added to the buffer they are reduced from."""

from __future__ import annotations

from torch import Tensor

from mindspeed_llm.ops.matmul_accumulate import matmul_accumulate


def wgrad_gemm_accum_fp32(x: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """main_grad [out, in] += grad_output [..., out]^T x [..., in], accumulated in main_grad's precision."""
    matmul_accumulate(main_grad, grad_output, x)


wgrad_gemm_accum_fp16 = wgrad_gemm_accum_fp32
