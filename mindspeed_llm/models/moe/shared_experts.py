"""Shared experts: one MLP that every token passes, with or without a gate."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from mindspeed_llm.models.config import ModelConfig
from mindspeed_llm.models.mlp import MLP


class SharedExperts(MLP):
    """[s, b, h] -> [s, b, h]; `gate_weight` [1, h] scales each token's output by a sigmoid (Qwen2-MoE)."""

    def __init__(self, config: ModelConfig, pg_collection: ProcessGroupCollection, gate: bool):
        super().__init__(config, pg_collection.tp, config.shape.moe_shared_expert_intermediate_size)
        self.gate_weight = None
        if gate:
            weight = self.linear_fc1.weight
            size = (1, config.shape.hidden_size)
            self.gate_weight = nn.Parameter(torch.empty(size, dtype=weight.dtype, device=weight.device))
            # Each rank sees its own tokens, so its gradient is a part of the whole one.
            self.gate_weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.begin_gated(hidden_states, hidden_states)()

    def begin_gated(self, hidden_states: Tensor, gate_input: Tensor) -> Callable[[], Tensor]:
        """linear_fc1 and the activation; what is returned computes the rest.

        Args:
            gate_input: as `hidden_states`, for the gate.
        """
        rest = self.begin(hidden_states)

        def finish() -> Tensor:
            output, bias = rest()
            if bias is not None:
                output = output + bias
            if self.gate_weight is None:
                return output
            return torch.sigmoid(F.linear(gate_input, self.gate_weight)) * output

        return finish
