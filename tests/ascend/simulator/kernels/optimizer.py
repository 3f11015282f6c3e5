"""AdamW in one call."""

from __future__ import annotations

import torch

from simulator.kernels.registry import kernel, require


@kernel("npu_apply_adam_w.out")
def npu_apply_adam_w(
    beta1_power, beta2_power, lr, weight_decay, beta1, beta2, epsilon, grad, max_grad_norm, amsgrad, maximize, *, out
):
    """`out` is (var, m, v), written in place; the powers are beta^(t - 1). Weight decay is decoupled."""
    var, m, v = out
    require(var.dtype == m.dtype == v.dtype == grad.dtype, "npu_apply_adam_w", "tensors differ in type")
    grad = -grad if maximize else grad
    var.mul_(1 - lr * weight_decay)
    m.mul_(beta1).add_(grad, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    second = v
    if amsgrad:
        second = torch.maximum(max_grad_norm, v, out=max_grad_norm)
    corrected = (second / (1 - beta2_power * beta2)).sqrt().add_(epsilon)
    var.addcdiv_(m / (1 - beta1_power * beta1), corrected, value=-lr)
    return var, m, v
