"""Norms, activations, rotation and softmax."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from simulator.kernels.registry import kernel, require

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@kernel("npu_rms_norm")
def npu_rms_norm(self, gamma, epsilon=1e-6):
    """-> x / rms * gamma, 1 / rms in fp32."""
    require(self.dtype in FLOATS and gamma.dtype in FLOATS, "npu_rms_norm", f"{self.dtype} with {gamma.dtype}")
    axes = tuple(range(self.dim() - gamma.dim(), self.dim()))
    require(self.shape[axes[0] :] == gamma.shape, "npu_rms_norm", "gamma is not of the last dimensions' shape")
    wide = self.float()
    inverse = torch.rsqrt(wide.square().mean(axes, keepdim=True) + epsilon)
    return (wide * inverse * gamma.float()).to(self.dtype), inverse


@kernel("npu_rms_norm_backward")
def npu_rms_norm_backward(dy, self, gamma, rstd):
    """-> gradients of x and, in fp32, of gamma."""
    axes = tuple(range(self.dim() - gamma.dim(), self.dim()))
    unit, grad = self.float() * rstd, dy.float() * gamma.float()
    grad_x = (grad - unit * (grad * unit).mean(axes, keepdim=True)) * rstd
    return grad_x.to(self.dtype), (dy.float() * unit).reshape(-1, *gamma.shape).sum(0)


@kernel("npu_add_rms_norm")
def npu_add_rms_norm(x1, x2, gamma, epsilon=1e-6):
    """-> norm of the sum, 1 / rms in fp32, the sum."""
    require(x1.shape == x2.shape and x1.dtype == x2.dtype == gamma.dtype, "npu_add_rms_norm", "tensors differ")
    total = x1 + x2
    return *npu_rms_norm(total, gamma, epsilon), total


def _turned(x: Tensor, mode: str) -> Tensor:
    if mode == "half":
        first, second = x.chunk(2, -1)
        return torch.cat((-second, first), -1)
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def _check_rotation(x: Tensor, cos: Tensor, mode: str) -> None:
    rule = "npu_rotary_mul"
    require(x.dtype in FLOATS, rule, f"{x.dtype} is not float16, bfloat16 or float32")
    require(x.dim() == 4 and cos.dim() == 4, rule, "tensors must have four dimensions")
    require(x.shape[-1] == cos.shape[-1], rule, "cos and sin must be as wide as a head")
    require(x.shape[-1] % 2 == 0 and x.shape[-1] < 896, rule, f"head size {x.shape[-1]} is odd or not below 896")
    require(mode in ("half", "interleave"), rule, f"rotary_mode {mode}")
    require(all(size < 1000 for size in x.shape[1:3]), rule, "batch and heads must be below 1000")


@kernel("npu_rotary_mul")
def npu_rotary_mul(self, r1, r2, rotary_mode="half", rotate=None):
    """cos * x + sin * turned(x)."""
    require(rotate is None, "npu_rotary_mul", "rotate is not simulated")
    _check_rotation(self, r1, rotary_mode)
    return (r1 * self + r2 * _turned(self, rotary_mode)).to(self.dtype)


@kernel("npu_rotary_mul_backward")
def npu_rotary_mul_backward(grad, self, r1, r2, rotary_mode="half"):
    """-> gradients of x, cos, sin."""
    _check_rotation(self, r1, rotary_mode)
    return (
        (grad * r1 - _turned(grad * r2, rotary_mode)).to(self.dtype),
        (grad * self).sum_to_size(r1.shape).to(r1.dtype),
        (grad * _turned(self, rotary_mode)).sum_to_size(r2.shape).to(r2.dtype),
    )


@kernel("npu_swiglu")
def npu_swiglu(self, dim=-1):
    """silu(first half) * second half."""
    require(self.dtype in FLOATS, "npu_swiglu", f"{self.dtype} is not float16, bfloat16 or float32")
    require(1 <= self.dim() <= 8, "npu_swiglu", f"{self.dim()} dimensions")
    require(self.shape[dim] % 2 == 0, "npu_swiglu", f"the dimension of size {self.shape[dim]} is odd")
    gate, up = self.float().chunk(2, dim)
    return (F.silu(gate) * up).to(self.dtype)


@kernel("npu_swiglu_backward")
def npu_swiglu_backward(grad_output, self, dim=-1):
    gate, up = self.float().chunk(2, dim)
    grad, sigmoid = grad_output.float(), torch.sigmoid(gate)
    grad_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat((grad_gate, grad * gate * sigmoid), dim).to(self.dtype)


def _softmax_mask(like: Tensor, mask: Tensor, fixed_triu_mask: bool) -> Tensor:
    return torch.ones(like.shape[-2:], dtype=torch.bool).triu(1) if fixed_triu_mask else mask


@kernel("npu_scaled_masked_softmax")
def npu_scaled_masked_softmax(x, mask, scale=1, fixed_triu_mask=False):
    """softmax(scale x), hidden scores being -10000."""
    rule = "npu_scaled_masked_softmax"
    require(x.dim() == 4, rule, "x must have four dimensions")
    require(all(32 <= size <= 4096 and size % 32 == 0 for size in x.shape[-2:]), rule, f"{tuple(x.shape[-2:])}")
    return (x.float() * scale).masked_fill(_softmax_mask(x, mask, fixed_triu_mask), -10000.0).softmax(-1).to(x.dtype)


@kernel("npu_scaled_masked_softmax_backward")
def npu_scaled_masked_softmax_backward(y_grad, y, mask, scale, fixed_triu_mask):
    grad, weights = y_grad.float(), y.float()
    inner = weights * (grad - (grad * weights).sum(-1, keepdim=True)) * scale
    return inner.masked_fill(_softmax_mask(y, mask, fixed_triu_mask), 0.0).to(y.dtype)
