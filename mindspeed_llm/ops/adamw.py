"""AdamW: decay the weights, update both moments, step, for lists of tensors in place.

    p -= lr wd p;  m += (1 - b1) (g - m);  v = b2 v + (1 - b2) g^2
    p -= lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)

Source: arXiv 1711.05101, in the order of operations of torch.optim.AdamW.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mindspeed_llm.ops.registry import REFERENCE, implementation, register


class Rates(NamedTuple):
    """The numbers of one step."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


def adamw_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    first_moments: Sequence[Tensor],
    second_moments: Sequence[Tensor],
    steps: Sequence[Tensor],
    rates: Rates,
) -> None:
    """One step of AdamW over tensors of equal shapes position by position, in place.

    Args:
        steps: fp32 scalars, how many steps each tensor has taken; this one is added.
    """
    if parameters:
        implementation("adamw")(parameters, gradients, first_moments, second_moments, steps, rates)


@register("adamw", "torch-fused")
def torch_fused_adamw_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    first_moments: Sequence[Tensor],
    second_moments: Sequence[Tensor],
    steps: Sequence[Tensor],
    rates: Rates,
) -> None:
    """torch's kernel, which reads and writes each tensor once."""
    torch._foreach_add_(list(steps), 1)
    torch._fused_adamw_(
        list(parameters),
        list(gradients),
        list(first_moments),
        list(second_moments),
        [],
        list(steps),
        lr=rates.lr,
        beta1=rates.beta1,
        beta2=rates.beta2,
        weight_decay=rates.weight_decay,
        eps=rates.eps,
        amsgrad=False,
        maximize=False,
        grad_scale=None,
        found_inf=None,
    )


@register("adamw", REFERENCE, priority=-1)
def reference(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    first_moments: Sequence[Tensor],
    second_moments: Sequence[Tensor],
    steps: Sequence[Tensor],
    rates: Rates,
) -> None:
    """The formula, one tensor and one operation at a time: bitwise torch.optim.AdamW without foreach and fused."""
    for p, g, m, v, step in zip(parameters, gradients, first_moments, second_moments, steps, strict=True):
        step += 1
        t = step.item()
        p.mul_(1 - rates.lr * rates.weight_decay)
        m.lerp_(g, 1 - rates.beta1)
        v.mul_(rates.beta2).addcmul_(g, g, value=1 - rates.beta2)
        denominator = (v.sqrt() / (1 - rates.beta2**t) ** 0.5).add_(rates.eps)
        p.addcdiv_(m, denominator, value=-rates.lr / (1 - rates.beta1**t))


class FusedAdamW(torch.optim.AdamW):
    """torch's AdamW, its state and its options, whose step is the operator."""

    @classmethod
    def take_over(cls, optimizer: torch.optim.AdamW) -> None:
        """Let an optimizer that exists already step by the operator, with the state it has.

        Raises:
            ValueError: it maximises or keeps maxima of the second moment, which the operator does not compute.
        """
        for group in optimizer.param_groups:
            if group["amsgrad"] or group["maximize"]:
                raise ValueError("amsgrad and maximize must be False: the AdamW operator computes neither")
            # Steps are counted beside the tensors, as kernels want them.
            group["fused"], group["foreach"] = True, False
        optimizer.__class__ = cls

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient.

        Raises:
            ValueError: a closure is given; the loss is not computed again here.
        """
        if closure is not None:
            raise ValueError("closure must be None")
        for group in self.param_groups:
            lists: tuple[list[Tensor], ...] = ([], [], [], [], [], [])
            parameters, gradients, first, second, maxima, steps = lists
            self._init_group(group, parameters, gradients, first, second, maxima, steps)
            rates = Rates(float(group["lr"]), *group["betas"], group["eps"], group["weight_decay"])
            adamw_(parameters, gradients, first, second, steps, rates)
