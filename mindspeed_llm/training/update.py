"""The optimizer's step in two halves: between the gradient norm and the first changed weight there is time to refuse.

megatron-core's `optimizer.step` prepares the gradients, clips and steps in one call. These are its parts, in its order
(`ChainedOptimizer.step`), with the same collectives.
"""

from __future__ import annotations

from typing import Any

from mindspeed_llm.checkpoint.optimizer_state import optimizer_parts


def gradient_norm(optimizer: Any) -> float | None:
    """Norm of the whole gradient, the same on every rank; None where the loss scaler found an overflow (fp16).

    Weights and moments are as they were; of the state only the loss scale has moved.
    """
    if optimizer.prepare_grads():
        return None
    return float(optimizer.get_grad_norm())


def apply_gradients(optimizer: Any, grad_norm: float) -> None:
    """Clip by the norm just computed, and step."""
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    for part in optimizer_parts(optimizer):
        parameters = part.get_parameters()
        if parameters and part.config.clip_grad > 0.0:
            clip_grad_by_total_norm_fp32(
                parameters,
                max_norm=part.config.clip_grad,
                total_norm=grad_norm,
                use_decoupled_grad=part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
            )
    assert optimizer.step_with_ready_grads(), "the optimizer took no step after its gradients were found finite"
