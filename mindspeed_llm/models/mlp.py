"""The feed-forward block: linear_fc1, activation, linear_fc2."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from mindspeed_llm.errors import UserError
from mindspeed_llm.models.config import ModelConfig
from mindspeed_llm.models.linear import ColumnParallelLinear, RowParallelLinear
from mindspeed_llm.models.recompute import keep, without_output
from mindspeed_llm.ops.activation import Gate, gated_activation

# HF's names of the activations (transformers.activations.ACT2FN).
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def activation_function(name: str) -> Callable[[Tensor], Tensor]:
    """The function HF calls `name`.

    Raises:
        UserError: not one of `ACTIVATIONS`.
    """
    if name not in ACTIVATIONS:
        raise UserError(
            f"activation: {name!r} is wrong, because there is none of that name; legal: {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def gate_of(name: str) -> Gate:
    """The gate of the activation HF calls `name`.

    Raises:
        UserError: not one of `ACTIVATIONS`.
    """
    activation_function(name)
    return Gate("gelu_tanh" if name in ("gelu_pytorch_tanh", "gelu_new") else name)


class MLP(MegatronModule):
    """[s, b, h] -> [s, b, h]. LoRA replaces linear_fc1 and linear_fc2 by modules called alike, `(x) -> (out, bias)`."""

    def __init__(self, config: ModelConfig, tp_group=None, ffn_hidden_size: int | None = None):
        super().__init__(config=config)
        shape = config.shape
        ffn_hidden_size = ffn_hidden_size or shape.ffn_hidden_size
        self.tp_group = ProcessGroupCollection.use_mpu_process_groups(["tp"]).tp if tp_group is None else tp_group
        self.gated = shape.gated_linear_unit
        self.recompute_activation = False
        self.activation = activation_function(shape.activation)
        self.gate = gate_of(shape.activation) if self.gated else None
        # stride 2: a rank holds its gate rows, then its up rows.
        self.linear_fc1 = ColumnParallelLinear(
            shape.hidden_size,
            ffn_hidden_size * (2 if self.gated else 1),
            config=config,
            init_method=config.init_method,
            bias=shape.add_mlp_bias,
            gather_output=False,
            stride=2 if self.gated else 1,
            tp_group=self.tp_group,
        )
        self.linear_fc2 = RowParallelLinear(
            ffn_hidden_size,
            shape.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=shape.add_mlp_bias,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=self.tp_group,
        )

    def forward(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Output and linear_fc2's bias, which the layer adds.

        megatron's layer gives `padding_mask` to dense and expert layers alike; each token is computed by itself here.
        """
        return self.begin(hidden_states)()

    def begin(self, hidden_states: Tensor) -> Callable[[], tuple[Tensor, Tensor | None]]:
        """linear_fc1 and the activation; what is returned computes the rest of `forward`."""
        intermediate, _ = self.linear_fc1(hidden_states)
        if self.recompute_activation:
            activated, drop = without_output(self.activate, intermediate)
        else:
            activated, drop = self.activate(intermediate), keep

        def finish() -> tuple[Tensor, Tensor | None]:
            output = self.linear_fc2(activated)
            drop(output[0])
            return output

        return finish

    def activate(self, intermediate: Tensor) -> Tensor:
        """[..., 2f] or [..., f] -> [..., f]."""
        return self.activation(intermediate) if self.gate is None else gated_activation(intermediate, self.gate)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """As megatron's MLP: gate and up of linear_fc1 are sharded each by itself, so that another layout can load."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.gated:
            singleton = (metadata or {}).get("singleton_local_shards", False)
            for key in (f"{prefix}linear_fc1.weight", f"{prefix}linear_fc1.bias"):
                if key in state:
                    state[key] = apply_swiglu_sharded_factory(state[key], sharded_offsets, singleton)
        return state
