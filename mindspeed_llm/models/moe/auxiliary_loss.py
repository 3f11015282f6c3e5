"""Losses of the router beside the language model's: load balancing and z-loss, layout-independent.

megatron-core attaches such a loss to the router's output, so that its gradient appears in the backward pass of the main
loss. There the main loss is the sum over trained tokens, and all gradients are divided by their number at the end of
the global batch. So that every micro-batch counts 1 / (number of micro-batches of the global batch), which is
megatron's definition, a loss is attached with the weight trained tokens / micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor, nn

from mindspeed_llm import accelerator
from mindspeed_llm.parallel.exact_sum import sum_float64

LOAD_BALANCING = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}
"""--moe-router-load-balancing-type -> megatron's name of the logged loss."""
Z_LOSS = "z_loss"


class AuxiliaryLosses:
    """What one router adds to the loss.

    Attributes:
        weight: of a loss in the sum over trained tokens; set before each global batch.
        sums: name -> sum over micro-batches since `take` of this rank's share of the loss, coefficient left out.
    """

    def __init__(self) -> None:
        self.weight = 1.0
        self.sums: dict[str, Tensor] = {}

    def attach(self, output: Tensor, name: str, loss: Tensor, coefficient: float) -> Tensor:
        """`output` unchanged; its backward pass also gives `loss` the gradient of a summand of the training loss.

        Args:
            loss: this rank's share of a micro-batch's loss: shares add up over tensor and context parallel ranks.
        """
        value = loss.detach().double()
        self.sums[name] = self.sums[name] + value if name in self.sums else value
        return MoEAuxLossAutoScaler.apply(output, loss * (coefficient * self.weight))


def forget_loss_scale() -> None:
    """Let the next forward pass set the scale of attached losses in its own form.

    megatron keeps one for the whole process and copies every later one into it; a backward pass before the first
    schedule leaves one of shape [], into which a schedule's [1] does not fit.
    """
    MoEAuxLossAutoScaler.main_loss_backward_scale = None


def load_balancing_loss(scores: Tensor, tokens_per_expert: Tensor, topk: int, num_tokens: Tensor | int) -> Tensor:
    """num_experts * sum over experts of (share of the choices) * (mean score), of this rank's tokens.

    Source: Switch Transformer, arXiv 2101.03961, equation 4, with the share divided by topk. With even choices and
    scores that sum to one it is 1.

    Args:
        scores: [t, e] of this rank's tokens, rows summing to one.
        tokens_per_expert: [e] choices among all the `num_tokens` tokens that the loss is about.
    """
    num_experts = scores.shape[1]
    return (scores.sum(dim=0) * tokens_per_expert).sum() * (num_experts / topk) / num_tokens**2


def z_loss(logits: Tensor, num_tokens: int) -> Tensor:
    """Sum over this rank's tokens of the squared log-sum-exp, divided by `num_tokens`. Source: arXiv 2202.08906."""
    return torch.logsumexp(logits.float(), dim=-1).square().sum() / num_tokens


def routers(chunks: Iterable[nn.Module]) -> list[nn.Module]:
    """The routers of this rank's layers, in order."""
    return [module for chunk in chunks for module in chunk.modules() if hasattr(module, "auxiliary_losses")]


def set_weights(chunks: Iterable[nn.Module], trained_tokens: float, num_micro_batches: int) -> None:
    """Prepare all routers for a global batch.

    Args:
        chunks: this rank's model parts.
        trained_tokens: of the global batch, over all ranks.
        num_micro_batches: of the global batch, over all data-parallel ranks.
    """
    for router in routers(chunks):
        router.auxiliary_losses.weight = trained_tokens / num_micro_batches


def take(chunks: Iterable[nn.Module], num_micro_batches: int) -> dict[str, float]:
    """Name -> mean over layers and micro-batches of the losses since the last call, the same on every rank.

    A collective call: every rank of the run makes it.

    Args:
        chunks: this rank's model parts.
        num_micro_batches: of the global batch, over all data-parallel ranks.
    """
    from megatron.core import parallel_state

    chunks = list(chunks)
    names = enabled_losses(_config(chunks[0]))
    found = routers(chunks)
    sums = [sum(float(router.auxiliary_losses.sums.get(name, 0.0)) for router in found) for name in names]
    for router in found:
        router.auxiliary_losses.sums = {}
    # Every layer lives on one stage; shares of its loss add up over all other kinds of ranks.
    device = accelerator.current().current_device()
    totals = torch.tensor(sums, dtype=torch.float64, device=device)
    layers = torch.tensor(float(len(found)), dtype=torch.float64, device=device)
    sum_float64(totals, parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True))
    for tensor in (totals, layers):
        sum_float64(tensor, parallel_state.get_pipeline_model_parallel_group())
    means = totals / (layers * num_micro_batches)
    return dict(zip(names, means.tolist()))


def is_enabled(chunks: list[nn.Module]) -> bool:
    """Whether the routers of a model add anything to its loss."""
    return bool(enabled_losses(_config(chunks[0])))


def enabled_losses(config) -> list[str]:
    """Names of the losses that a configuration's coefficients switch on."""
    if config.num_moe_experts is None:
        return []
    types, coefficients = load_balancing(config)
    names = [LOAD_BALANCING[kind] for kind, coefficient in zip(types, coefficients) if coefficient > 0]
    return [*names, Z_LOSS] if config.moe_z_loss_coeff else names


def load_balancing(config) -> tuple[list[str], list[float]]:
    """(kinds, coefficients) of the load-balancing losses of a configuration; "none" is left out."""
    types, coefficients = config.moe_router_load_balancing_type, config.moe_aux_loss_coeff
    if isinstance(types, str):
        types, coefficients = [types], [coefficients]
    pairs = [(kind, value) for kind, value in zip(types, coefficients) if kind != "none"]
    return [kind for kind, _ in pairs], [value for _, value in pairs]


def _config(chunk: nn.Module):
    while not hasattr(chunk, "config"):
        chunk = chunk.module
    return chunk.config
