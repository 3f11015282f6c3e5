"""Whose sample and which module made a loss or a gradient that is not finite: the batch is repeated under hooks.

Nothing here runs while all is well. What runs is collective: every rank repeats the same number of micro-batches, since
those of the others take part in its matrix products.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mindspeed_llm.data.collate import MicroBatch
from mindspeed_llm.plan.plan import Plan
from mindspeed_llm.training.guards.batch_state import BatchState
from mindspeed_llm.training.guards.first_module import Finding, nonfinite_weights, watching
from mindspeed_llm.training.guards.sources import Sample, SampleSource, append_lines, as_rows
from mindspeed_llm.training.setup import TrainingModel, placement
from mindspeed_llm.training.step import run_batch

SHOWN = 3


@dataclass(frozen=True)
class Culprit:
    """What one rank found in one of its micro-batches.

    Attributes:
        order: (micro-batch, place in the order of computation), smallest first.
        samples: of the micro-batch, or those of them that do it alone.
    """

    rank: int
    host: str
    replica: int
    micro_batch: int
    order: tuple[int, int]
    finding: Finding
    samples: list[Sample]


@dataclass(frozen=True)
class Diagnosis:
    """Alike on all ranks.

    Attributes:
        culprits: one for each micro-batch that went wrong, in order.
        weights: parameters that are not finite themselves, with the ranks that hold them.
    """

    culprits: list[Culprit]
    weights: dict[str, list[int]] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.weights:
            shown = [f"{name} on ranks {ranks}" for name, ranks in list(self.weights.items())[:SHOWN]]
            return f"weights are not finite before the batch, so no sample is to blame: {'; '.join(shown)}"
        if not self.culprits:
            return (
                "the same batch repeated is finite throughout, so no sample is to blame but a random fault; "
                "try: --replay-batch-interval to look for a device that computes wrongly"
            )
        shown = [
            f"rank {c.rank} on {c.host}, {', '.join(map(str, c.samples[:SHOWN]))}: first in the {c.finding}"
            for c in self.culprits[:SHOWN]
        ]
        more = f"; and {len(self.culprits) - SHOWN} more micro-batches" if len(self.culprits) > SHOWN else ""
        return "; ".join(shown) + more


class Diagnosing:
    """Repeats batches of one model to find out what is wrong with them."""

    def __init__(self, plan: Plan, model: TrainingModel, source: SampleSource) -> None:
        self.plan, self.model, self.source = plan, model, source

    def diagnose(self, consumed_samples: int, state: BatchState) -> Diagnosis:
        """Find the culprits of the batch after `consumed_samples`; collective, leaves random states as in `state`.

        Gradients in the model are worthless afterwards.
        """
        from megatron.core import parallel_state

        replica = parallel_state.get_data_parallel_rank()
        weights = _by_name(_gather(nonfinite_weights(self.model.chunks, self._name_of)))
        batches = self.source.data.micro_batches(consumed_samples, replica)
        for gradients in (False, True):
            found = _gather((replica, self._repeat(batches, state, gradients)))
            if any(finding for _, findings in found for finding in findings):
                break
        suspects: dict[int, list[int]] = {}
        for number, findings in found:
            bad = {k for k, finding in enumerate(findings) if finding}
            suspects[number] = sorted(bad | set(suspects.get(number, [])))
        rows = self.source.rows(consumed_samples, replica)
        alone = {} if weights else self._narrow(rows, suspects, replica, state, gradients)
        own = self._culprits(found[dist.get_rank()][1], rows, alone, replica, gradients)
        state.restore()
        return Diagnosis(_first_of_each(_gather(own)), weights)

    def _repeat(self, batches: Sequence[MicroBatch], state: BatchState, gradients: bool) -> list[Finding | None]:
        """What goes wrong on this rank in each micro-batch."""
        state.restore()
        with watching(self.model.chunks, self._name_of, gradients) as first, torch.set_grad_enabled(gradients):
            return [self._run(batch, gradients, first) for batch in batches]

    def _run(self, batch: MicroBatch, gradients: bool, first: Any) -> Finding | None:
        # Interleaved stages want as many micro-batches as there are stages.
        copies = self.plan.pipeline_parallel_size if len(self.model.chunks) > 1 else 1
        for wrapped in self.model.wrapped:
            wrapped.zero_grad_buffer()
        run_batch(self.model.wrapped, [batch] * copies, self.plan, forward_only=not gradients)
        return first()

    def _narrow(
        self, rows: list[list[int]], suspects: dict[int, list[int]], replica: int, state: BatchState, gradients: bool
    ) -> dict[int, list[int]]:
        """Micro-batch -> the samples of it that go wrong when they are alone.

        All replicas repeat equally many samples, since they may exchange tokens between experts.
        """
        mine = suspects[replica]
        rounds = max(len(s) for s in suspects.values())
        if len(rows[0]) == 1:
            return {}
        tried = [(mine[k] if k < len(mine) else 0, i) for k in range(rounds) for i in range(len(rows[0]))]
        batches = [self.source.alone(rows[k][i]) for k, i in tried]
        findings = self._repeat(batches, state, gradients)
        bad = [(k, i) for (k, i), finding in zip(tried, findings) if finding and k in mine]
        everybody = [pairs for number, pairs in _gather((replica, bad)) if number == replica]
        alone: dict[int, list[int]] = {}
        for k, i in sorted({pair for pairs in everybody for pair in pairs}):
            alone.setdefault(k, []).append(rows[k][i])
        return alone

    def _culprits(
        self,
        findings: list[Finding | None],
        rows: list[list[int]],
        alone: dict[int, list[int]],
        replica: int,
        gradients: bool,
    ) -> list[Culprit]:
        from megatron.core import parallel_state

        stage = parallel_state.get_pipeline_model_parallel_rank()
        rank, host = dist.get_rank(), socket.gethostname()
        culprits = []
        for k, finding in enumerate(findings):
            if finding is not None:
                place = stage + finding.chunk * parallel_state.get_pipeline_model_parallel_world_size()
                samples = [self.source.sample(index) for index in alone.get(k, rows[k])]
                order = (k, -place if gradients else place)
                culprits.append(Culprit(rank, host, replica, k, order, finding, samples))
        return culprits

    def _name_of(self, chunk: int, local: str) -> str:
        return placement(self.plan, chunk).global_name(local)


def write_culprits(directory: Path, iteration: int, loss: float, diagnosis: Diagnosis) -> list[Path]:
    """Each culprit's rank writes the whole text of its samples to rank_R.nonfinite.jsonl.

    Returns:
        The files of all ranks.
    """
    rank, files = dist.get_rank(), []
    for culprit in diagnosis.culprits:
        file = directory / f"rank_{culprit.rank}.nonfinite.jsonl"
        if culprit.rank == rank:
            found = {"module": culprit.finding.module, "what": culprit.finding.what}
            facts = {"iteration": iteration, "rank": rank, "host": culprit.host, "loss": str(loss)} | found
            append_lines(file, as_rows(culprit.samples, **facts))
        if file not in files:
            files.append(file)
    return files


def _first_of_each(found: list[list[Culprit]]) -> list[Culprit]:
    """The earliest culprit of every micro-batch of every replica: copies on other ranks only pass it on."""
    first: dict[tuple[int, int], Culprit] = {}
    for culprit in sorted((c for own in found for c in own), key=lambda c: (c.order, c.rank)):
        first.setdefault((culprit.replica, culprit.micro_batch), culprit)
    return sorted(first.values(), key=lambda c: (c.micro_batch, c.replica))


def _by_name(found: list[list[str]]) -> dict[str, list[int]]:
    """Name -> the ranks that said it."""
    table: dict[str, list[int]] = {}
    for rank, names in enumerate(found):
        for name in names:
            table.setdefault(name, []).append(rank)
    return table


def _gather(mine: Any) -> list[Any]:
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, mine)
    return everybody
