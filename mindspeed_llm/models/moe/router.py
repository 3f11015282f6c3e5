"""The router of a layer with experts: logits, choice, capacity, auxiliary losses, counts for the score bias."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.moe.moe_utils import compute_routing_scores_for_aux_loss
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from mindspeed_llm import accelerator
from mindspeed_llm.models.config import ModelConfig
from mindspeed_llm.models.moe.auxiliary_loss import (
    LOAD_BALANCING,
    Z_LOSS,
    AuxiliaryLosses,
    load_balancing,
    load_balancing_loss,
    z_loss,
)
from mindspeed_llm.models.moe.routing import choose_experts, drop_tokens, expert_capacity, routing_tables

ROUTER_DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


class Router(TopKRouter):
    """megatron's TopKRouter by other means: `weight` [e, h], buffers and their updates are its own.

    What differs: the logits are a plain product (megatron's needs Transformer Engine), the choice can rank groups as
    either DeepSeek does, tokens are dropped by position in a defined way, and auxiliary losses do not depend on how a
    micro-batch is spread over tensor and context parallel ranks.
    """

    def __init__(self, config: ModelConfig, pg_collection: ProcessGroupCollection | None = None):
        super().__init__(config, pg_collection)
        if not config.use_cpu_initialization:  # megatron's own gating would move it from the host at its first call
            self.weight.data = self.weight.data.to(accelerator.current().current_device())
        self.auxiliary_losses = AuxiliaryLosses()

    def gating(self, input: Tensor) -> Tensor:
        """[s, b, h] -> logits [s, b, e] in `moe_router_dtype`, or the input's type."""
        dtype = ROUTER_DTYPES.get(self.config.moe_router_dtype, input.dtype)
        return F.linear(input.to(dtype), self.weight.to(dtype))

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits [s, b, e] -> weights [s * b, e] and where they are not zero, [s * b, e] bool.

        Padding (`padding_mask` [s, b] True) is routed as any token, but auxiliary losses and the counts for the score
        bias leave it out: how much there is of it depends on the layout.
        """
        config, shape = self.config, self.config.shape
        rows = logits.shape[1]
        counted = torch.ones_like(logits[..., :1], dtype=torch.bool)
        if padding_mask is not None:
            counted = ~padding_mask.unsqueeze(-1)
        counted = counted.flatten(0, 1)  # [s * b, 1]
        logits = self._with_z_loss(logits.flatten(0, 1), counted)
        weights, experts = choose_experts(logits, shape, self.expert_bias)
        probs, routing_map = routing_tables(weights, experts, shape.num_moe_experts)
        if config.moe_expert_capacity_factor is not None:
            capacity = expert_capacity(logits.shape[0], shape, config.moe_expert_capacity_factor)
            probs, routing_map = drop_tokens(
                probs, routing_map, capacity, config.moe_token_drop_policy, config.moe_pad_expert_input_to_capacity
            )
        if self._learns():
            probs = self._with_load_balancing(probs, logits, counted, rows)
            if self.enable_expert_bias:
                self.local_tokens_per_expert += (routing_map & counted).sum(dim=0)
        return probs, routing_map

    def _learns(self) -> bool:
        """Whether this pass is the one whose gradients count: not evaluation, nor the first pass of recomputation."""
        return self.training and torch.is_grad_enabled()

    def _with_z_loss(self, logits: Tensor, counted: Tensor) -> Tensor:
        coefficient = self.config.moe_z_loss_coeff
        if not coefficient or not self._learns():
            return logits
        loss = z_loss(logits[counted.squeeze(-1)], self._sum_over_ranks(counted.sum()))
        return self.auxiliary_losses.attach(logits, Z_LOSS, loss, coefficient)

    def _with_load_balancing(self, probs: Tensor, logits: Tensor, counted: Tensor, rows: int) -> Tensor:
        """Attach the load-balancing losses to the weights; logits [s * b, e] with b = rows, the row varying fastest."""
        kinds, coefficients = load_balancing(self.config)
        if not any(coefficients):
            return probs
        chosen, scores = compute_routing_scores_for_aux_loss(logits.float(), self.topk, self.score_function)
        chosen, scores = chosen & counted, scores * counted
        losses = {"aux_loss": self._by_batch, "seq_aux_loss": self._by_sequence, "global_aux_loss": self._by_global}
        for kind, coefficient in zip(kinds, coefficients):
            if coefficient > 0:
                loss = losses[kind](scores, chosen, counted, rows)
                probs = self.auxiliary_losses.attach(probs, LOAD_BALANCING[kind], loss, coefficient)
        return probs

    def _sum_over_ranks(self, counts: Tensor) -> Tensor:
        """Counts of this rank's tokens, summed over the ranks that share a micro-batch."""
        return reduce_from_tensor_model_parallel_region(counts, self.tp_cp_group)

    def _by_batch(self, scores: Tensor, chosen: Tensor, counted: Tensor, rows: int) -> Tensor:
        counts = self._sum_over_ranks(chosen.sum(dim=0))
        return load_balancing_loss(scores, counts, self.topk, self._sum_over_ranks(counted.sum()))

    def _by_sequence(self, scores: Tensor, chosen: Tensor, counted: Tensor, rows: int) -> Tensor:
        """The mean over rows of each row's own loss."""
        by_row = chosen.unflatten(0, (-1, rows)).sum(dim=0)  # [b, e]
        counts = self._sum_over_ranks(by_row)
        lengths = self._sum_over_ranks(counted.unflatten(0, (-1, rows)).sum(dim=0))  # [b, 1]
        shares = scores.unflatten(0, (-1, rows)).sum(dim=0) * counts / lengths**2
        return shares.sum() * (scores.shape[1] / self.topk) / rows

    def _by_global(self, scores: Tensor, chosen: Tensor, counted: Tensor, rows: int) -> Tensor:
        """As `_by_batch`, with the choices of all micro-batches of the global batch so far, on all replicas."""
        counts = reduce_from_tensor_model_parallel_region(chosen.sum(dim=0), self.tp_dp_cp_group)
        self.global_tokens_per_expert += counts
        self.ga_steps += 1
        replicas = self.tp_dp_cp_group.size() // self.tp_cp_group.size()
        mean_counts = self.global_tokens_per_expert / (self.ga_steps * replicas)
        return load_balancing_loss(scores, mean_counts, self.topk, self._sum_over_ranks(counted.sum()))
