"""megatron-core's parallel linears with an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from mindspeed_llm.lora.function import FrozenLinearWithAdapter, LinearKind
from mindspeed_llm.models.linear import ColumnParallelLinear, RowParallelLinear
from mindspeed_llm.plan.adapters import FUSED_PARTS, AdapterSettings, linear_sizes


class LoraMixin:
    """The adapter of one linear: `lora_A` [k r, in] and, for each adapted part, `lora_B.<part>` [out of part, r].

    k is 1 when the parts share A (upstream's fused targets), else the number of adapted parts. Parts are cut over
    tensor-parallel ranks each by itself, so a checkpoint of them does not know how megatron-core interleaves q, k, v.
    """

    def add_adapter(self, module_name: str, settings: AdapterSettings) -> None:
        """Register A and B (uninitialised); the base parameters are frozen by the caller."""
        parts = settings.targets[module_name]
        self.adapter_parts: tuple[str, ...] = parts or FUSED_PARTS[module_name]
        self.shares_a = not parts
        self.module_name, self.rank = module_name, settings.rank
        self.dropout = settings.dropout
        column = isinstance(self, ColumnParallelLinear)
        world = self.tp_group.size()
        chunks = self.config.communication_chunks or 1
        self.kind = LinearKind(column, self.config.sequence_parallel, self.tp_group, world, settings.scaling, chunks)
        like = dict(dtype=self.weight.dtype, device=self.weight.device)
        sizes = linear_sizes(self.config.shape)[module_name]
        self.part_rows = {part: out // (world if column else 1) for part, (_, out) in sizes.items()}
        rows = self.rank if self.shares_a else self.rank * len(self.adapter_parts)
        self.lora_A = nn.Parameter(torch.empty(rows, self.weight.shape[1], **like))
        self.lora_B = nn.ParameterDict(
            {part: nn.Parameter(torch.empty(self.part_rows[part], self.rank, **like)) for part in self.adapter_parts}
        )
        for parameter in self.lora_B.values() if column else [self.lora_A]:
            tensor_parallel.set_tensor_model_parallel_attributes(parameter, True, 0 if column else 1, 1)
        for parameter in [self.lora_A] if column else self.lora_B.values():
            # Consumed with a shard of the sequence: its gradient is a share of the sum over tensor-parallel ranks.
            parameter.sequence_parallel = self.kind.sequence_parallel

    def stacked_b(self) -> Tensor:
        """B over all output rows of the linear, in megatron-core's row order: [out, k r], zero where nothing adapts."""
        if len(self.part_rows) == 1:
            return self.lora_B[self.adapter_parts[0]]
        groups = self.config.shape.num_query_groups // self.kind.world if self.module_name == "linear_qkv" else 1
        blocks = []
        width = self.lora_A.shape[0]
        for part, rows in self.part_rows.items():
            if part not in self.adapter_parts:
                blocks.append(self.weight.new_zeros(groups, rows // groups, width))
                continue
            block = self.lora_B[part].view(groups, rows // groups, self.rank)
            if not self.shares_a:
                before = self.adapter_parts.index(part) * self.rank
                block = nn.functional.pad(block, (before, width - before - self.rank))
            blocks.append(block)
        return torch.cat(blocks, dim=1).view(-1, width)

    def dropped_input(self, x: Tensor) -> Tensor | None:
        """x after dropout, None when there is none.

        Ranks that hold the same x (column without SP) draw from the stream they share, the others from their own.
        """
        if self.dropout == 0.0 or not self.training:
            return None
        if self.kind.column and not self.kind.sequence_parallel:
            return nn.functional.dropout(x, self.dropout)
        with tensor_parallel.get_cuda_rng_tracker().fork():
            return nn.functional.dropout(x, self.dropout)

    def forward(self, x: Tensor, *arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor | None]:
        """As the base linear: (output, bias that the caller adds)."""
        if self.weight.requires_grad:
            return self.forward_with_trained_base(x)
        bias = None if self.skip_bias_add or not self.kind.column else self.bias
        out = FrozenLinearWithAdapter.apply(
            x, self.dropped_input(x), self.weight, bias, self.lora_A, self.stacked_b(), self.kind
        )
        return out, self.bias if self.skip_bias_add else None

    def forward_with_trained_base(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Base and adapter one after the other, for a base that is trained too (`--trainable`)."""
        out, bias = super().forward(x)
        dropped = self.dropped_input(x)
        source = x if dropped is None else dropped
        gather = tensor_parallel.gather_from_sequence_parallel_region
        group = dict(group=self.tp_group)
        if self.kind.column and not self.kind.sequence_parallel:
            narrow = tensor_parallel.copy_to_tensor_model_parallel_region(source @ self.lora_A.t(), **group)
        elif self.kind.column:
            narrow = gather(source @ self.lora_A.t(), tensor_parallel_output_grad=True, **group)
        elif self.kind.sequence_parallel:
            narrow = tensor_parallel.reduce_scatter_to_sequence_parallel_region(source @ self.lora_A.t(), **group)
        else:
            narrow = tensor_parallel.reduce_from_tensor_model_parallel_region(source @ self.lora_A.t(), **group)
        return out + narrow @ self.stacked_b().t() * self.kind.scaling, bias

    def delta(self) -> Tensor:
        """The matrix that the adapter adds to this rank's weight, fp32 [out, in]."""
        return self.kind.scaling * (self.stacked_b().float() @ self.lora_A.float())

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Sequence = (), metadata: Any = None):
        """megatron-core's shards of weight, bias, A and B."""
        if self.kind.column:
            axes = {"weight": 0, "bias": 0, **{f"lora_B.{part}": 0 for part in self.adapter_parts}}
        else:
            axes = {"weight": 1, "lora_A": 1}
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            axes,
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


class LoraColumnParallelLinear(LoraMixin, ColumnParallelLinear):
    """A ColumnParallelLinear with an adapter."""


class LoraRowParallelLinear(LoraMixin, RowParallelLinear):
    """A RowParallelLinear with an adapter."""
