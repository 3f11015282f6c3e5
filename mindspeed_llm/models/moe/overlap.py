"""A layer with experts whose tokens travel while something is computed; bit for bit the values of the layer without.

    shared experts    begun (linear_fc1, activation) while tokens travel to their experts, ended (linear_fc2) while
                      results travel back: `--moe-shared-expert-overlap`
    parts             and a rank's experts in a few parts: the tokens of one part travel while the experts of the one
                      before compute, and its results while those of the next do: `--moe-alltoall-overlap-comm`

Parts are whole experts, so each multiplies the same rows in the same order as without them, and no sum is taken in
another order. Backward, the same work hides the same journeys (`parallel.row_exchange`).

Legend: s sequence, b batch, h hidden, r rows (tokens times experts of a token), l experts of a rank, w expert-parallel
ranks, x ranks that share an expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from mindspeed_llm.models.moe.experts import Part
from mindspeed_llm.parallel.row_exchange import Journey, depart

# Parts of a rank's experts: the first part's way there and the last one's way back are hidden by shared experts alone.
MOST_PARTS = 4


def sizes_of_parts(num_local_experts: int) -> list[int]:
    """Experts of each part, as even as possible."""
    count = min(num_local_experts, MOST_PARTS)
    small, more = divmod(num_local_experts, count)
    return [small + (number < more) for number in range(count)]


class _Copies(torch.autograd.Function):
    """One tensor under several names, whose gradients are added in this order whatever the order they arrive in."""

    @staticmethod
    def forward(ctx, x: Tensor, count: int) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for _ in range(count))

    @staticmethod
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        total = None
        for grad in grads:
            if grad is not None:
                total = grad if total is None else total + grad
        return total, None


@dataclass(frozen=True)
class Traffic:
    """Numbers of rows of one part of every rank's experts.

    Attributes:
        send, receive: [w] to and from each expert-parallel rank.
        shares: [x] that the ranks that share these experts have received.
        blocks: of consecutive rows once those are joined, [x w, experts of the part].
    """

    send: list[int]
    receive: list[int]
    shares: list[int]
    blocks: list[list[int]]

    @property
    def by_expert(self) -> Tensor:
        """[experts of the part] rows."""
        return torch.tensor([sum(column) for column in zip(*self.blocks)])

    def sorted_by_expert(self, rows: Tensor) -> Tensor:
        """Rows in the order of `blocks`, read by rows -> by columns."""
        lines, columns = len(self.blocks), len(self.blocks[0])
        pieces = rows.split([size for line in self.blocks for size in line])
        return torch.cat([pieces[line * columns + c] for c in range(columns) for line in range(lines)])

    def sorted_by_rank(self, rows: Tensor) -> Tensor:
        """The inverse."""
        lines, columns = len(self.blocks), len(self.blocks[0])
        pieces = rows.split([line[c] for c in range(columns) for line in self.blocks])
        return torch.cat([pieces[c * lines + line] for line in range(lines) for c in range(columns)])


class OverlappedMoELayer(MoELayer):
    """[s, b, h] -> [s, b, h]; megatron's layer with its all-to-all dispatcher, computed in another order in time."""

    def forward(
        self, hidden_states: Tensor, intermediate_tensors: None = None, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """As megatron's; `padding_mask` [b, s]. Parts of the layer cannot be called by themselves."""
        if padding_mask is not None:
            padding_mask = padding_mask.transpose(0, 1).bool()
        if self.moe_layer_recompute:
            return tensor_parallel.checkpoint(self._compute, False, hidden_states, padding_mask), None
        return self._compute(hidden_states, padding_mask), None

    def _compute(self, hidden_states: Tensor, padding_mask: Tensor | None) -> Tensor:
        # Their order is the one in which the layer without overlap adds their gradients.
        to_experts, to_router, to_gate, to_shared = _Copies.apply(hidden_states, 4)
        probs, routing_map = self.route(to_router, padding_mask)
        rows, weights = self.preprocess(to_experts, probs, routing_map)
        dispatcher = self.token_dispatcher
        # Brings the numbers of rows to the host.
        dispatcher.tokens_per_expert = dispatcher._maybe_dtoh_and_synchronize(
            "before_ep_alltoall", dispatcher.tokens_per_expert
        )
        in_parts = self.config.expert_overlap == "parts" and self.num_local_experts > 1
        compute = self._in_parts if in_parts else self._at_once
        output, shared = compute(rows, weights, to_shared, to_gate)
        return self.postprocess(output, shared)

    def _at_once(
        self, rows: Tensor, weights: Tensor, to_shared: Tensor, to_gate: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Rows [r, h] by expert with their routing weights [r] -> results [r, h], and those of shared experts."""
        d = self.token_dispatcher
        send, receive = d.input_splits, d.output_splits
        if d.drop_and_pad:
            send = receive = [rows.shape[0] // d.ep_size] * d.ep_size
        there = [depart(x, send, receive, d.ep_group) for x in (rows, weights)]
        finish = self._begin_shared_experts(to_shared, to_gate)
        result, _ = self.routed_experts_compute(*(journey.arrive() for journey in there))
        back = depart(result, receive, send, d.ep_group)
        shared = finish()
        return back.arrive(), shared

    def _in_parts(
        self, rows: Tensor, weights: Tensor, to_shared: Tensor, to_gate: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """As `_at_once`."""
        sizes = sizes_of_parts(self.num_local_experts)
        traffic = self._traffic(sizes)
        there = self._depart_in_parts((rows, weights), traffic)
        finish = self._begin_shared_experts(to_shared, to_gate)
        back = [
            self._compute_part(compute, way, journeys)
            for compute, way, journeys in zip(self.experts.in_parts(sizes), traffic, there)
        ]
        shared = finish()
        pieces = [journey.arrive().split(way.send) for journey, way in zip(back, traffic)]
        return torch.cat([piece for rank in zip(*pieces) for piece in rank]), shared

    def _depart_in_parts(self, tensors: tuple[Tensor, ...], traffic: list[Traffic]) -> list[list[Journey]]:
        """Rows of [r, ...], by expert, on their way: every part's, of all the tensors."""
        order = [size for rank in zip(*(way.send for way in traffic)) for size in rank]
        pieces = [x.split(order) for x in tensors]
        return [
            [
                depart(torch.cat(of_all[part :: len(traffic)]), way.send, way.receive, self.token_dispatcher.ep_group)
                for of_all in pieces
            ]
            for part, way in enumerate(traffic)
        ]

    def _traffic(self, sizes: list[int]) -> list[Traffic]:
        """How many rows of each part go where, from what the dispatcher has counted."""
        d, local = self.token_dispatcher, self.num_local_experts
        own = d.routing_map.sum(dim=0).view(d.ep_size, local).tolist()
        arriving = d.num_global_tokens_per_local_expert.view(d.tp_size * d.ep_size, local).tolist()
        parts, start = [], 0
        for size in sizes:
            chosen = slice(start, start + size)
            blocks = [line[chosen] for line in arriving]
            by_source = [sum(line) for line in blocks]
            parts.append(
                Traffic(
                    send=[sum(line[chosen]) for line in own],
                    receive=by_source[d.tp_rank * d.ep_size :][: d.ep_size],
                    shares=[sum(by_source[x * d.ep_size :][: d.ep_size]) for x in range(d.tp_size)],
                    blocks=blocks,
                )
            )
            start += size
        return parts

    def _compute_part(self, compute: Part, way: Traffic, there: list[Journey]) -> Journey:
        """What the experts of one part make of the rows that arrive, on its way back."""
        d = self.token_dispatcher
        rows, weights = (journey.arrive() for journey in there)
        if d.tp_size > 1:
            rows, weights = (
                gather_from_sequence_parallel_region(x, group=d.tp_group, output_split_sizes=way.shares)
                for x in (rows, weights)
            )
        result = compute(way.sorted_by_expert(rows), way.by_expert, way.sorted_by_expert(weights))
        result = way.sorted_by_rank(result)
        if d.tp_size > 1:
            # In the type of the routing weights, as megatron's dispatcher adds up the shares of an expert.
            result = reduce_scatter_to_sequence_parallel_region(
                result.to(d.probs.dtype), group=d.tp_group, input_split_sizes=way.shares
            ).to(result.dtype)
        return depart(result, way.receive, way.send, d.ep_group)

    def _begin_shared_experts(self, hidden_states: Tensor, to_gate: Tensor) -> Callable[[], Tensor | None]:
        """What ends the shared experts, after their first half; with recomputation of the whole, all at once."""
        if self.shared_experts is None:
            return lambda: None
        if not self.shared_experts_recompute:
            return self.shared_experts.begin_gated(hidden_states, to_gate)
        output = tensor_parallel.checkpoint(self.shared_experts, False, hidden_states)
        return lambda: output
