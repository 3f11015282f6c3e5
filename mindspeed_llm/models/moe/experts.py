"""Routed experts of one rank: gated MLPs one after another, or all at once by grouped matrix products.

megatron-core's dispatcher hands them tokens sorted by local expert and adds up the outputs of a token's experts (and of
the ranks that share an expert), so nothing here communicates.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from mindspeed_llm import accelerator
from mindspeed_llm.models.config import ModelConfig
from mindspeed_llm.models.linear import linear
from mindspeed_llm.models.mlp import activation_function, gate_of
from mindspeed_llm.models.moe.sharding import expert_sharded_state
from mindspeed_llm.models.nf4_weight import Nf4Weight
from mindspeed_llm.models.recompute import keep, without_output
from mindspeed_llm.ops.activation import gated_activation
from mindspeed_llm.ops.grouped_matmul import grouped_matmul


def expert_weight(config: ModelConfig, *size: int) -> nn.Parameter | Nf4Weight:
    """An uninitialised weight of routed experts, marked as reduced over the expert data-parallel group alone."""
    device = "cpu" if config.use_cpu_initialization else accelerator.current().current_device()
    if config.quantized_linears:
        return Nf4Weight(size, config.params_dtype, torch.device(device))
    weight = nn.Parameter(torch.empty(*size, dtype=config.params_dtype, device=device))
    # megatron marks experts so only with expert parallelism, but with expert tensor parallel size 1 and tensor
    # parallelism their replicas are other ranks than those of dense layers without it as well.
    weight.allreduce = False
    return weight


# What experts multiply by, under names: tensors [local experts, ...], NF4 weights, or the experts' modules in a list.
Operands = Mapping[str, Any]
Part = Callable[[Tensor, Tensor, Tensor], Tensor]


def cut_by_expert(operand: Any, sizes: Sequence[int]) -> list[Any]:
    """An operand in parts of so many experts; gradients of a tensor's parts are joined, not added."""
    if len(sizes) == 1:
        return [operand]
    if isinstance(operand, Tensor):
        return list(operand.split(list(sizes)))
    ends = list(itertools.accumulate(sizes))
    return [operand[end - size : end] for size, end in zip(sizes, ends)]


def activation_of(config: ModelConfig) -> Callable[[Tensor], Tensor]:
    """[t, 2f] or [t, f] -> [t, f]: what stands between an expert's two linears."""
    shape = config.shape
    if shape.gated_linear_unit:
        return functools.partial(gated_activation, gate=gate_of(shape.activation))
    return activation_function(shape.activation)


def weighted(hidden: Tensor, probs: Tensor) -> Tensor:
    """Rows [t, f] times their routing weights [t], computed in the weights' type."""
    return (hidden * probs.unsqueeze(-1)).to(hidden.dtype)


class Experts(MegatronModule):
    """What both kinds of experts share: sizes on this rank, activation, the sharded state of a checkpoint."""

    def __init__(self, num_local_experts: int, config: ModelConfig, pg_collection: ProcessGroupCollection):
        super().__init__(config=config)
        shape = config.shape
        self.num_local_experts = num_local_experts
        self.groups = pg_collection
        self.local_ffn_size = shape.moe_ffn_hidden_size // pg_collection.expt_tp.size()
        self.fc1_rows = self.local_ffn_size * (2 if shape.gated_linear_unit else 1)
        self.activation = activation_of(config)
        self.recompute_all = self.recompute_activation = False

    def forward(self, tokens: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        """Tokens [t, h] sorted by local expert, their numbers [local experts], routing weights [t] -> [t, h]."""
        (everything,) = self.in_parts([self.num_local_experts])
        return everything(tokens, tokens_per_expert, probs), None

    def in_parts(self, sizes: Sequence[int]) -> list[Part]:
        """The first `sizes[0]` local experts, the next `sizes[1]`, and so on, each by itself.

        Returns:
            Functions of a part's tokens [t, h], their numbers [experts of the part] and routing weights [t] to [t, h].
        """
        operands = self.operands()
        cut = [cut_by_expert(operand, sizes) for operand in operands.values()]
        return [functools.partial(self._compute, dict(zip(operands, part))) for part in zip(*cut)]

    def _compute(self, operands: Operands, tokens: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> Tensor:
        if not self.recompute_all or not torch.is_grad_enabled():
            return self.outputs(tokens, tokens_per_expert, probs, operands)
        # Tensors are inputs of what is recomputed: a part's gradients go back to the whole in the outer backward pass.
        tensors = {name: operand for name, operand in operands.items() if isinstance(operand, Tensor)}

        def run(tokens: Tensor, probs: Tensor, *given: Tensor) -> Tensor:
            return self.outputs(tokens, tokens_per_expert, probs, {**operands, **dict(zip(tensors, given))})

        return tensor_parallel.checkpoint(run, False, tokens, probs, *tensors.values())

    def operands(self) -> Operands:
        """What `outputs` multiplies by, of all local experts."""
        raise NotImplementedError

    def outputs(self, tokens: Tensor, tokens_per_expert: Tensor, probs: Tensor, operands: Operands) -> Tensor:
        """As `forward`, for the experts of these operands."""
        raise NotImplementedError

    def between(self, intermediate: Tensor, probs: Tensor) -> tuple[Tensor, Callable[[Tensor], None]]:
        """What the second linear takes, and `drop` of `models.recompute.without_output`."""
        if self.recompute_activation:
            return without_output(self._weighted_activation, intermediate, probs)
        return self._weighted_activation(intermediate, probs), keep

    def _weighted_activation(self, intermediate: Tensor, probs: Tensor) -> Tensor:
        return weighted(self.activation(intermediate), probs)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """All experts of the model as one tensor [experts, out, in] per linear, under megatron's keys."""
        return expert_sharded_state(self, prefix, sharded_offsets)


class ExpertLinear(nn.Module):
    """A linear of one expert, called like megatron's: `(x) -> (out, bias)`."""

    def __init__(self, config: ModelConfig, out_features: int, in_features: int):
        super().__init__()
        self.weight = expert_weight(config, out_features, in_features)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return linear(x, self.weight), None


class Expert(nn.Module):
    """One expert's share on this rank."""

    def __init__(self, config: ModelConfig, fc1_rows: int, ffn_size: int):
        super().__init__()
        self.linear_fc1 = ExpertLinear(config, fc1_rows, config.shape.hidden_size)
        self.linear_fc2 = ExpertLinear(config, config.shape.hidden_size, ffn_size)


class SequentialExperts(Experts):
    """`local_experts.{i}.linear_fc1`, `.linear_fc2`: one expert after another."""

    def __init__(self, num_local_experts: int, config: ModelConfig, pg_collection: ProcessGroupCollection):
        super().__init__(num_local_experts, config, pg_collection)
        self.local_experts = nn.ModuleList(
            Expert(config, self.fc1_rows, self.local_ffn_size) for _ in range(num_local_experts)
        )

    def operands(self) -> Operands:
        return {"local_experts": self.local_experts}

    def outputs(self, tokens: Tensor, tokens_per_expert: Tensor, probs: Tensor, operands: Operands) -> Tensor:
        sizes = tokens_per_expert.tolist()
        outputs = []
        for expert, rows, weights in zip(operands["local_experts"], tokens.split(sizes), probs.split(sizes)):
            hidden, drop = self.between(expert.linear_fc1(rows)[0], weights)
            outputs.append(expert.linear_fc2(hidden)[0])
            drop(outputs[-1])
        return torch.cat(outputs)


class GroupedExperts(Experts):
    """`weight1` [local experts, 2f, h] and `weight2` [local experts, h, f]: one grouped product for each linear."""

    def __init__(self, num_local_experts: int, config: ModelConfig, pg_collection: ProcessGroupCollection):
        super().__init__(num_local_experts, config, pg_collection)
        hidden_size = config.shape.hidden_size
        self.weight1 = expert_weight(config, num_local_experts, self.fc1_rows, hidden_size)
        self.weight2 = expert_weight(config, num_local_experts, hidden_size, self.local_ffn_size)

    def operands(self) -> Operands:
        return {"weight1": self.weight1, "weight2": self.weight2}

    def outputs(self, tokens: Tensor, tokens_per_expert: Tensor, probs: Tensor, operands: Operands) -> Tensor:
        sizes = tokens_per_expert.cpu()
        hidden, drop = self.between(grouped_matmul(tokens, operands["weight1"], sizes), probs)
        out = grouped_matmul(hidden, operands["weight2"], sizes)
        drop(out)
        return out
