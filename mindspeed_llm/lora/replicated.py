"""Adapters of linears that every tensor-parallel rank holds whole: the down projections of latent attention, routers.

Nothing is sent for them. Under sequence parallelism a rank sees its share of the tokens, so that the gradients of A and
B are shares of a sum, which megatron forms for parameters with the mark `sequence_parallel`; otherwise all ranks
compute the same gradients.
"""

from __future__ import annotations

import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor
from torch.distributed import ProcessGroup

from mindspeed_llm.lora.function import adapted_linear
from mindspeed_llm.lora.layers import LoraMixin
from mindspeed_llm.models.latent_attention import ReplicatedLinear
from mindspeed_llm.models.moe.router import Router


class LoraReplicatedMixin(LoraMixin):
    """The adapter of such a linear."""

    @property
    def tp_group(self) -> ProcessGroup:
        """Of the ranks that hold copies."""
        return parallel_state.get_tensor_model_parallel_group()

    def adapter_output(self, x: Tensor) -> Tensor:
        """s B A x [..., out], in the type of x."""
        dropped = self.dropped_input(x)
        narrow = F.linear(x if dropped is None else dropped, self.lora_A.to(x.dtype))
        return F.linear(narrow, self.stacked_b().to(x.dtype)) * self.kind.scaling


class LoraReplicatedLinear(LoraReplicatedMixin, ReplicatedLinear):
    """A ReplicatedLinear with an adapter."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """As the base linear."""
        if self.weight.requires_grad:
            return ReplicatedLinear.forward(self, x)[0] + self.adapter_output(x), None
        factors = (self.lora_A, self.stacked_b())
        out = adapted_linear(x, self.adapter_dropout(x), self.weight, None, *factors, self.kind)
        return out * self.gains() if self.uses_dora else out, None


class LoraRouter(Router, LoraReplicatedMixin):
    """A router with an adapter, computed in the type of its logits.

    Router comes first: Python lets an object change its class only for one that begins like its own, and that of
    routers begins with an abstract class, which has no dictionary.
    """

    sharded_state_dict = LoraReplicatedMixin.sharded_state_dict

    def gating(self, input: Tensor) -> Tensor:
        """[s, b, h] -> logits [s, b, e]."""
        logits = Router.gating(self, input)
        logits = logits + self.adapter_output(input.to(logits.dtype))
        return logits * self.gains().to(logits.dtype) if self.uses_dora else logits
