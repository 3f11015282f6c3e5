"""megatron-core's parallel linears with an adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from mindspeed_llm.lora.function import LinearKind, adapted_linear, dense
from mindspeed_llm.lora.prepacked import PrepackedWeight
from mindspeed_llm.models.linear import ColumnParallelLinear, RowParallelLinear
from mindspeed_llm.models.recompute import stream_of_rank
from mindspeed_llm.ops.adapter import CounterMask, masks_by_counter
from mindspeed_llm.plan.adaptable import Adaptable
from mindspeed_llm.plan.adapters import AdapterSettings


def squared_row_norms(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Squares of the norms of the rows of W + B A, fp32 [out], without making that matrix.

    ||w + b A||^2 = ||w||^2 + 2 (w A^T) b^T + b (A A^T) b^T for a row w of W and b of B. Where W and A are cut by
    columns, these are shares of a sum.

    Args:
        weight: [out, in]; a: [R, in]; b: [out, R], scaled, fp32: scaling it in 16 bits would round it.
    """
    squares = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
    squares += 2 * ((weight @ a.t()).float() * b).sum(1)
    a = a.float()
    return squares + ((b @ (a @ a.t())) * b).sum(1)


class LoraMixin:
    """The adapter of one linear: `lora_A` [sum of ranks, in] and, for each adapted part, `lora_B.<part>` [out, r].

    Where the parts share A (upstream's fused targets) it is [r, in]. Parts are cut over tensor-parallel ranks each by
    itself, so a checkpoint of them does not know how megatron-core interleaves q, k, v. With DoRA there is
    `lora_magnitude.<part>` [out] too, cut like the rows of B: the output row i is scaled by
    magnitude_i / norm of (W + s B A)_i, the norm being taken over the whole input.
    """

    _prepacked: PrepackedWeight | None = None

    def add_adapter(self, linear: Adaptable, settings: AdapterSettings) -> None:
        """Register A, B and magnitudes (uninitialised); the base parameters are frozen by the caller."""
        chosen, name = settings.targets[linear.module], linear.module
        self.adapter_parts: tuple[str, ...] = chosen or tuple(linear.parts)
        self.shares_a, self.dropout = not chosen, settings.dropout
        self.ranks = {part: settings.rank_of(name, part) for part in self.adapter_parts}
        scalings = {part: settings.scaling_of(name, part) for part in self.adapter_parts}
        common = scalings[self.adapter_parts[0]] if len(set(scalings.values())) == 1 else 1.0
        # What B of a part is multiplied by where the parts are not scaled alike.
        self.relative_scalings = {part: scaling / common for part, scaling in scalings.items()}
        self.is_cut, column = linear.cut != "replicated", linear.cut != "row"
        world = self.tp_group.size() if self.is_cut else 1
        chunks = self.config.communication_chunks
        self.kind = LinearKind(column, self.config.sequence_parallel, self.tp_group, world, common, chunks)
        self.part_rows = {part: out // (world if column else 1) for part, (_, out) in linear.parts.items()}
        # Of q, k and v every group of queries has its rows together.
        self.row_groups = self.config.shape.num_query_groups // world if linear.packing == "qkv" else 1
        self.register_factors(settings.use_dora)

    def register_factors(self, use_dora: bool) -> None:
        """The parameters, marked with how they are cut and whose gradients are shares of a sum."""
        like = dict(dtype=self.weight.dtype, device=self.weight.device)
        rows = self.ranks[self.adapter_parts[0]] if self.shares_a else sum(self.ranks.values())
        self.lora_A = nn.Parameter(torch.empty(rows, self.weight.shape[1], **like))
        self.lora_B = nn.ParameterDict(
            {part: nn.Parameter(torch.empty(self.part_rows[part], rank, **like)) for part, rank in self.ranks.items()}
        )
        by_row = [*self.lora_B.values()]
        if use_dora:
            self.lora_magnitude = nn.ParameterDict(
                {part: nn.Parameter(torch.empty(self.part_rows[part], **like)) for part in self.adapter_parts}
            )
            by_row += self.lora_magnitude.values()
        column = self.kind.column
        cut, whole = (by_row, [self.lora_A]) if column else ([self.lora_A], by_row)
        if not self.is_cut:
            cut, whole = [], [self.lora_A, *by_row]
        for parameter in cut:
            tensor_parallel.set_tensor_model_parallel_attributes(parameter, True, 0 if column else 1, 1)
        for parameter in whole:
            # Consumed with a shard of the sequence: its gradient is a share of the sum over tensor-parallel ranks.
            parameter.sequence_parallel = self.kind.sequence_parallel

    @property
    def uses_dora(self) -> bool:
        """Whether magnitudes are trained."""
        return hasattr(self, "lora_magnitude")

    def stacked_rows(self, blocks: Mapping[str, Tensor], fill: Callable[[int], Tensor]) -> Tensor:
        """Rows of the parts in megatron-core's order.

        Args:
            blocks: part -> its rows [rows of part, ...].
            fill: (rows) -> the rows of a part that is not there.
        """
        groups, stacked = self.row_groups, []
        for part, rows in self.part_rows.items():
            block = blocks[part] if part in blocks else fill(rows)
            stacked.append(block.view(groups, rows // groups, *block.shape[1:]))
        return torch.cat(stacked, dim=1).flatten(0, 1)

    def split_rows(self, rows: Tensor) -> dict[str, Tensor]:
        """The inverse of `stacked_rows`: part -> its rows."""
        counts = [count // self.row_groups for count in self.part_rows.values()]
        blocks = rows.view(self.row_groups, -1, *rows.shape[1:]).split(counts, dim=1)
        return {part: block.flatten(0, 1) for part, block in zip(self.part_rows, blocks)}

    def stacked_b(self) -> Tensor:
        """B over all output rows of the linear, in megatron-core's row order: [out, rows of A], zero where not adapted.

        Parts that are scaled differently are scaled here, the common scaling being `kind.scaling`.
        """
        width, before, blocks = self.lora_A.shape[0], 0, {}
        for part in self.adapter_parts:
            block, rank = self.lora_B[part], self.ranks[part]
            if self.relative_scalings[part] != 1.0:
                block = block * self.relative_scalings[part]
            if not self.shares_a:
                block = nn.functional.pad(block, (before, width - before - rank))
                before += rank
            blocks[part] = block
        if len(self.part_rows) == 1:
            return blocks[self.adapter_parts[0]]
        return self.stacked_rows(blocks, lambda rows: self.lora_A.new_zeros(rows, width))

    @torch.no_grad()
    def row_norms(self) -> Tensor:
        """Norms of the rows of W + s B A over the whole input, fp32 [out]."""
        squares = squared_row_norms(dense(self.weight), self.lora_A, self.stacked_b().float() * self.kind.scaling)
        if not self.kind.column and self.kind.world > 1:
            dist.all_reduce(squares, group=self.kind.group)
        # A row of zeros has magnitude zero, and what it is divided by does not matter.
        return squares.clamp_min(torch.finfo(torch.float32).tiny).sqrt()

    def gains(self) -> Tensor:
        """What each output is multiplied by: magnitude / norm [out], 1 where not adapted.

        The norm gets no gradient, as in section 4.3 of the paper.
        """
        magnitudes = self.stacked_rows(dict(self.lora_magnitude), lambda rows: self.lora_A.new_ones(rows))
        norms = self.row_norms()
        if len(self.adapter_parts) < len(self.part_rows):
            adapted = {part: norms.new_ones(self.part_rows[part]) for part in self.adapter_parts}
            norms = torch.where(self.stacked_rows(adapted, norms.new_zeros).bool(), norms, 1.0)
        return (magnitudes / norms).to(magnitudes.dtype)

    def dropped_input(self, x: Tensor) -> Tensor | None:
        """x after dropout, None when there is none."""
        return self.drawn(nn.functional.dropout, x)

    def adapter_dropout(self, x: Tensor) -> Tensor | CounterMask | None:
        """`dropped_input`, or its mask alone where the operators drop what they read (ops/adapter.py)."""
        return self.drawn(CounterMask.draw, x) if masks_by_counter() else self.dropped_input(x)

    def drawn(self, draw: Callable[[Tensor, float], Any], x: Tensor) -> Any:
        """draw(x, dropout), None when there is none.

        Ranks that hold the same x (column without SP) draw from the stream they share, the others from their own.
        """
        if self.dropout == 0.0 or not self.training:
            return None
        if self.kind.column and not self.kind.sequence_parallel:
            return draw(x, self.dropout)
        with stream_of_rank(self.config):
            return draw(x, self.dropout)

    def prepacked(self) -> PrepackedWeight | None:
        """The weight laid out for its products, anew where it was written to; None where that is not asked for."""
        if not self.kind.prepack:
            return None
        if self._prepacked is None or not self._prepacked.is_of(self.weight):
            self._prepacked = PrepackedWeight(self.weight)
        return self._prepacked

    def forward(self, x: Tensor, *arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor | None]:
        """As the base linear: (output, bias that the caller adds)."""
        if self.weight.requires_grad or not self.kind.fused:
            return self.forward_one_after_the_other(x)
        own_bias = None if self.skip_bias_add or not self.kind.column else self.bias
        bias = None if self.uses_dora else own_bias
        factors = self.lora_A, self.stacked_b()
        out = adapted_linear(x, self.adapter_dropout(x), self.weight, bias, *factors, self.kind, self.prepacked())
        if self.uses_dora:
            out = out * self.gains()
            out = out if own_bias is None else out + own_bias
        return out, self.bias if self.skip_bias_add else None

    def forward_one_after_the_other(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Base and adapter each with its own collectives: for a base that is trained too, and `--no-lora-fusion`."""
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
        out = out + narrow @ self.stacked_b().t() * self.kind.scaling
        if self.uses_dora:
            gains = self.gains()
            own_bias = None if self.skip_bias_add else self.bias
            # The magnitude belongs to the products alone, and the bias is among them here.
            out = out * gains if own_bias is None else out * gains + own_bias * (1 - gains)
        return out, bias

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """This rank's weight with the adapter in it, fp32 [out, in]."""
        merged = dense(self.weight).float() + self.kind.scaling * (self.stacked_b().float() @ self.lora_A.float())
        return merged * self.gains().float()[:, None] if self.uses_dora else merged

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Sequence = (), metadata: Any = None):
        """megatron-core's shards of weight, bias, A, B and magnitudes."""
        if not self.is_cut:
            axes = {}
        elif self.kind.column:
            names = [name for name, _ in self.named_parameters() if name.startswith(("lora_B.", "lora_magnitude."))]
            axes = {"weight": 0, "bias": 0, **dict.fromkeys(names, 0)}
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
