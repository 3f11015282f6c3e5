"""Adapters of routed experts: each expert its own A and B, those of all local experts in two grouped matrix products.

    y_e = x_e W_e^T + (x_e A_e^T) (s_e B_e)^T

Forming W_e + s_e B_e A_e pays where an expert gets more than 2 in out / (in + out) tokens, and then saves no more than
r (in + out) / (2 in out) of the base's operations, 1.4 % for r = 16 and 2048 x 768 (docs/lora-fusion.md); in bf16 it
rounds the adapter away for that. So the narrow products stay beside the base's, whose weights may be stored one by one,
stacked or quantised. Nothing here communicates forward: with expert tensor parallelism the outputs of linear_fc2 are
shares of a sum, and so are the adapter's, by linearity. Backward, the factor that is not cut (A of linear_fc1, B of
linear_fc2) has a share of its gradient on each of those ranks, which are summed.

With DoRA output i of expert e is scaled by magnitude_ei / norm of row i of W_e + s_e B_e A_e, the norm being taken over
the whole input, so that of linear_fc2 its square is summed over the ranks that share the expert. The scale belongs to
the sum of the outputs, hence to each share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.tensor_parallel.random import get_expert_parallel_rng_tracker_name
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from mindspeed_llm.lora.function import dense
from mindspeed_llm.lora.initial import initial_a
from mindspeed_llm.lora.layers import squared_row_norms
from mindspeed_llm.lora.tensors import AdapterTensors
from mindspeed_llm.models.moe.experts import Experts, GroupedExperts, Operands, SequentialExperts
from mindspeed_llm.models.moe.sharding import expert_sharded_state
from mindspeed_llm.ops.grouped_matmul import grouped_matmul
from mindspeed_llm.plan.adaptable import Adaptable
from mindspeed_llm.plan.adapters import AdapterSettings

# GroupedExperts' names of its weights.
WEIGHTS = {"linear_fc1": "weight1", "linear_fc2": "weight2"}


class ExpertFactors(nn.Module):
    """The adapters of one kind of linear of all local experts: `lora_A` [e, k r, in], `lora_B.<part>` [e, out, r].

    With DoRA there is `lora_magnitude.<part>` [e, out] too, cut like the rows of B. k is 1 when gate and up share A,
    else the number of adapted parts (with ranks of their own, k r is their sum). Factors that expert tensor parallelism
    does not cut are marked `whole_in_expert`: its ranks hold copies.

    Args:
        linear: whose adapters these are.
        experts: what they belong to.
        like: a weight of the same type and device.
    """

    def __init__(self, linear: Adaptable, settings: AdapterSettings, experts: Experts, like: Any):
        super().__init__()
        self.linear, self.groups, self.num_experts = linear, experts.groups, experts.num_local_experts
        self.column, self.dropout = linear.cut == "column", settings.dropout
        self.shares_a = not settings.targets[linear.module]
        self.adapter_parts = settings.targets[linear.module] or tuple(linear.parts)
        self.scaling = {part: settings.scaling_of(linear.module, part) for part in self.adapter_parts}
        world = self.groups.expt_tp.size()
        self.part_rows = {part: out // (world if self.column else 1) for part, (_, out) in linear.parts.items()}
        self.ranks = {part: settings.rank_of(linear.module, part) for part in self.adapter_parts}
        self.starts, total = {}, 0
        for part, rank in self.ranks.items():
            self.starts[part] = 0 if self.shares_a else total
            total = rank if self.shares_a else total + rank
        width = linear.in_features // (1 if self.column else world)

        def new(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(self.num_experts, *size, dtype=like.dtype, device=like.device))

        self.lora_A = new(total, width)
        self.lora_B = nn.ParameterDict({part: new(self.part_rows[part], rank) for part, rank in self.ranks.items()})
        by_row = [*self.lora_B.values()]
        if settings.use_dora:
            self.lora_magnitude = nn.ParameterDict({part: new(self.part_rows[part]) for part in self.adapter_parts})
            by_row += self.lora_magnitude.values()
        for parameter in self.parameters():
            # As the experts' own weights: reduced among the ranks that hold the same experts.
            parameter.allreduce = False
        for parameter in by_row if self.column else [self.lora_A]:
            tensor_parallel.set_tensor_model_parallel_attributes(parameter, True, 1 if self.column else 2, 1)
        for parameter in [self.lora_A] if self.column else by_row:
            parameter.whole_in_expert = True
            # megatron's gradient norm leaves out copies by the dense layers' tensor-parallel rank, which says nothing
            # about experts: the first copy counts as a tensor of its own, the others as shared.
            if self.groups.expt_tp.rank() == 0:
                tensor_parallel.set_tensor_model_parallel_attributes(parameter, True, 0, 1)
            else:
                parameter.shared = True

    @property
    def uses_dora(self) -> bool:
        """Whether magnitudes are trained."""
        return hasattr(self, "lora_magnitude")

    def stacked_b(self) -> Tensor:
        """s B over all output rows of each expert's linear: [e, out, k r], zero where nothing adapts."""
        width, blocks = self.lora_A.shape[1], []
        for part, rows in self.part_rows.items():
            if part not in self.lora_B:
                blocks.append(self.lora_A.new_zeros(self.num_experts, rows, width))
                continue
            start, block = self.starts[part], self.lora_B[part] * self.scaling[part]
            blocks.append(nn.functional.pad(block, (start, width - start - block.shape[-1])))
        return torch.cat(blocks, dim=1)

    def operands(self) -> tuple[Tensor, Tensor]:
        """A [e, k r, in] and s B [e, out, k r] of all local experts."""
        a, b = self.lora_A, self.stacked_b()
        if self.groups.expt_tp.size() > 1:
            whole = sum_of_gradients(a if self.column else b, self.groups.expt_tp)
            a, b = (whole, b) if self.column else (a, whole)
        return a, b

    def forward(self, x: Tensor, sizes: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """What the adapters add for tokens [t, in] sorted by local expert, `sizes` of each: [t, out].

        Args:
            a, b: `operands`, or a part of the experts' of both.
        """
        if self.dropout and self.training:
            # Ranks get different numbers of tokens, so none of the streams that ranks share may be drawn from.
            with tensor_parallel.get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
                x = nn.functional.dropout(x, self.dropout)
        return grouped_matmul(grouped_matmul(x, a, sizes), b, sizes)

    @torch.no_grad()
    def row_norms(self, weight: Callable[[int], Tensor]) -> Tensor:
        """Norms of the rows of every local expert's W + s B A over the whole input, fp32 [e, out].

        Args:
            weight: number of a local expert -> its W on this rank.
        """
        b = self.stacked_b().float()
        squares = torch.stack([squared_row_norms(weight(e), self.lora_A[e], b[e]) for e in range(self.num_experts)])
        if not self.column and self.groups.expt_tp.size() > 1:
            dist.all_reduce(squares, group=self.groups.expt_tp)
        # A row of zeros has magnitude zero, and what it is divided by does not matter.
        return squares.clamp_min(torch.finfo(torch.float32).tiny).sqrt()

    def gains(self, norms: Tensor) -> Tensor:
        """What each expert's outputs are multiplied by: magnitude / norm [e, out], 1 where nothing adapts.

        Args:
            norms: `row_norms`; they get no gradient, as in section 4.3 of the paper.
        """
        blocks = []
        for part, own in self._by_part(norms).items():
            adapted = part in self.lora_magnitude
            blocks.append(self.lora_magnitude[part] / own if adapted else torch.ones_like(own))
        gains = torch.cat(blocks, dim=1).to(self.lora_A.dtype)
        shared = not self.column and self.groups.expt_tp.size() > 1
        return sum_of_gradients(gains, self.groups.expt_tp) if shared else gains

    def _by_part(self, rows: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.part_rows, rows.split([*self.part_rows.values()], dim=1)))

    def delta(self, index: int) -> Tensor:
        """The matrix that the adapter adds to one local expert's weight on this rank, fp32 [out, in]."""
        return self.stacked_b()[index].float() @ self.lora_A[index].float()

    def paths(self, path: str) -> list[str]:
        """Linears of the local experts in the whole model, from this module's path with its layer counted there."""
        first = self.groups.ep.rank() * self.num_experts
        prefix, name = path.rsplit(".", 1)
        return [f"{prefix}.local_experts.{first + index}.{name}" for index in range(self.num_experts)]

    @torch.no_grad()
    def initialize_adapter(self, path: str, seed: int) -> None:
        """A as for other linears, expert by expert; B zero."""
        shared = {"all": self.lora_A.shape[1]}
        for index, name in enumerate(self.paths(path)):
            drawn = initial_a(name, shared if self.shares_a else self.ranks, self.linear.in_features, seed)
            self.lora_A[index].copy_(self._columns(drawn))
        for factor in self.lora_B.values():
            factor.zero_()

    @torch.no_grad()
    def initialize_magnitudes(self, norms: Tensor) -> None:
        """Those of the weights, B being zero: at first the experts compute what they did."""
        rows = self._by_part(norms)
        for part, magnitude in self.lora_magnitude.items():
            magnitude.copy_(rows[part])

    @torch.no_grad()
    def fill(self, path: str, tensors: AdapterTensors) -> int:
        """Copy the local experts' adapters, cut to this rank; returns the number of tensors."""
        for index, name in enumerate(self.paths(path)):
            for part in self.adapter_parts:
                adapter, start = tensors[name, part], self.starts[part]
                self.lora_A[index, start : start + self.ranks[part]].copy_(self._columns(adapter.a))
                self.lora_B[part][index].copy_(self._rows(adapter.b))
                if self.uses_dora:
                    self.lora_magnitude[part][index].copy_(self._rows(adapter.magnitude))
        return self.num_experts * (1 + len(self.adapter_parts) * (2 if self.uses_dora else 1))

    def _columns(self, a: Tensor) -> Tensor:
        tp = self.groups.expt_tp
        return a if self.column else a.chunk(tp.size(), dim=1)[tp.rank()]

    def _rows(self, b: Tensor) -> Tensor:
        tp = self.groups.expt_tp
        return b.chunk(tp.size())[tp.rank()] if self.column else b

    def sharded_state(self, prefix: str, key: str, offsets: Sequence[Any]) -> dict[str, ShardedTensor]:
        """Local name -> place in a checkpoint, where all experts of the model are one tensor [experts, ...] per factor.

        Args:
            prefix: of the local names.
            key: of the checkpoint's tensors.
            offsets: megatron's (axis, number, count) of dimensions that enclosing modules put in front.
        """
        groups, lead = self.groups, len(offsets)
        experts = (lead, groups.ep.rank(), groups.ep.size())
        state = {}
        for name, parameter in self.named_parameters():
            by_row = name != "lora_A"
            axis = lead + 1 if by_row else lead + 2
            is_cut = by_row == self.column
            cut = [(axis, groups.expt_tp.rank(), groups.expt_tp.size())] if is_cut else []
            copies = (0, 0 if is_cut else groups.expt_tp.rank(), groups.expt_dp.rank())
            state[prefix + name] = ShardedTensor.from_rank_offsets(
                key + name, parameter, *offsets, experts, *cut, replica_id=copies, prepend_axis_num=lead
            )
        return state


def sum_of_gradients(factor: Tensor, group: ProcessGroup) -> Tensor:
    """The factor; its gradient is the sum of those of all ranks."""
    return tensor_parallel.copy_to_tensor_model_parallel_region(factor, group=group)


class _Scaled(torch.autograd.Function):
    """Rows [t, n], sorted by expert, times their expert's gains [e, n]; the gains of every row are not kept."""

    @staticmethod
    def forward(ctx, rows: Tensor, gains: Tensor, sizes: Tensor) -> Tensor:
        """As above; `sizes` of each expert [e]."""
        ctx.save_for_backward(rows, gains)
        ctx.sizes = sizes.tolist()
        return torch.cat([part * gain for part, gain in zip(rows.split(ctx.sizes), gains)])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients of rows and gains."""
        rows, gains = ctx.saved_tensors
        pieces = list(zip(grad.split(ctx.sizes), rows.split(ctx.sizes), gains))
        of_gains = torch.stack([(dy * part).sum(0) for dy, part, _ in pieces])
        return torch.cat([dy * gain for dy, _, gain in pieces]), of_gains, None


class LoraExpertsMixin:
    """Routed experts with adapters on one or both of their linears: `linear_fc1`, `linear_fc2` are ExpertFactors."""

    def add_adapter(self, linear: Adaptable, settings: AdapterSettings) -> ExpertFactors:
        """Register the factors of one kind of linear (uninitialised); the base parameters are frozen by the caller."""
        name = linear.module.rsplit(".", 1)[-1]
        factors = ExpertFactors(linear, settings, self, self.base_weight(name))
        setattr(self, name, factors)
        return factors

    def operands(self) -> Operands:
        """Those of the experts without adapters, and both factors of each adapted linear."""
        found = dict(super().operands())
        for name in filter(partial(hasattr, self), WEIGHTS):
            factors = getattr(self, name)
            found[f"{name}.a"], found[f"{name}.b"] = factors.operands()
            if factors.uses_dora:
                found[f"{name}.gains"] = self.gains(name)
        return found

    def gains(self, name: str) -> Tensor:
        """What the outputs of one kind of linear are multiplied by (DoRA): [local experts, out]."""
        factors = getattr(self, name)
        return factors.gains(factors.row_norms(partial(self.dense_weight, name)))

    def outputs(self, tokens: Tensor, tokens_per_expert: Tensor, probs: Tensor, operands: Operands) -> Tensor:
        """As of the experts without adapters."""
        sizes = tokens_per_expert.cpu()
        hidden, drop = self.between(self._with_adapter("linear_fc1", tokens, sizes, operands), probs)
        out = self._with_adapter("linear_fc2", hidden, sizes, operands)
        drop(out)
        return out

    def _with_adapter(self, name: str, x: Tensor, sizes: Tensor, operands: Operands) -> Tensor:
        out, factors = self.base_product(name, x, sizes, operands), getattr(self, name, None)
        if factors is None:
            return out
        out = out + factors(x, sizes, operands[f"{name}.a"], operands[f"{name}.b"])
        return _Scaled.apply(out, operands[f"{name}.gains"], sizes) if factors.uses_dora else out

    @torch.no_grad()
    def merge_adapters(self) -> int:
        """Add every adapter to its weight (in fp32, rounded once), forget them; returns the number of linears."""
        count = 0
        for name in WEIGHTS:
            if (factors := getattr(self, name, None)) is None:
                continue
            gains = self.gains(name).float()[..., None] if factors.uses_dora else [1.0] * self.num_local_experts
            for index, gain in enumerate(gains):
                weight = self.base_weight(name, index)
                weight.copy_(((weight.float() + factors.delta(index)) * gain).to(weight.dtype))
                count += 1
            delattr(self, name)
        # LoraGroupedExperts(LoraExpertsMixin, GroupedExperts): the last base is what it was.
        self.__class__ = type(self).__bases__[-1]
        return count

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """The experts' own tensors, and each factor of all experts of the model as one."""
        adapted = {name: getattr(self, name) for name in WEIGHTS if hasattr(self, name)}
        own = [item for item in self.named_parameters() if item[0].split(".")[0] not in adapted]
        state = expert_sharded_state(self, prefix, sharded_offsets, own)
        for name, factors in adapted.items():
            state |= factors.sharded_state(f"{prefix}{name}.", f"{prefix}experts.{name}.", sharded_offsets)
        return state


class LoraGroupedExperts(LoraExpertsMixin, GroupedExperts):
    """Stacked experts with adapters."""

    def base_weight(self, name: str, index: int | None = None) -> Any:
        """All local experts' weights, or one's."""
        weights = getattr(self, WEIGHTS[name])
        return weights if index is None else weights[index]

    def dense_weight(self, name: str, index: int) -> Tensor:
        """The matrix of one local expert's linear [out, in]."""
        weights = getattr(self, WEIGHTS[name])
        return weights[index] if isinstance(weights, Tensor) else weights.expert(index)

    def base_product(self, name: str, x: Tensor, sizes: Tensor, operands: Operands) -> Tensor:
        """Tokens through the frozen linears."""
        return grouped_matmul(x, operands[WEIGHTS[name]], sizes)


class LoraSequentialExperts(LoraExpertsMixin, SequentialExperts):
    """Experts one after another, with adapters that are computed all at once."""

    def base_weight(self, name: str, index: int | None = None) -> Any:
        """One local expert's weight."""
        return getattr(self.local_experts[index or 0], name).weight

    def dense_weight(self, name: str, index: int) -> Tensor:
        """The matrix of one local expert's linear [out, in]."""
        return dense(self.base_weight(name, index))

    def base_product(self, name: str, x: Tensor, sizes: Tensor, operands: Operands) -> Tensor:
        """Tokens through the frozen linears."""
        pieces = zip(operands["local_experts"], x.split(sizes.tolist()))
        return torch.cat([getattr(expert, name)(rows)[0] for expert, rows in pieces])


ADAPTED = {GroupedExperts: LoraGroupedExperts, SequentialExperts: LoraSequentialExperts}
