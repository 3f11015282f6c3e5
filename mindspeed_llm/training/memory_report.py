"""`--memory-report`: where the memory of each rank goes in the second iteration, predicted beside measured.

The second iteration is the first that is like all others: the optimizer has its state, allocators have seen every size.
Weights, gradients and optimizer are counted from the tensors that are there; activations are what autograd holds; what
an allocator saw beyond them at its peak is temporary. torch keeps no such peak on a CPU, so there nothing is said of
temporary tensors, and resident memory, in which Python and all libraries are, stands below the table.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from mindspeed_llm import accelerator
from mindspeed_llm.checkpoint.optimizer_state import optimizer_parts
from mindspeed_llm.memory.saved import SavedBytes
from mindspeed_llm.models.nf4_weight import nf4_weights
from mindspeed_llm.parallel.shards import gathered_parameters, shard_of, shards_of
from mindspeed_llm.plan.memory import MemoryEstimate
from mindspeed_llm.plan.plan import Plan
from mindspeed_llm.plan.show import stages_memory
from mindspeed_llm.training.hooks import LoopHook, Wish
from mindspeed_llm.training.setup import TrainingModel, is_leader

if TYPE_CHECKING:
    from mindspeed_llm.training.loop import TrainingLoop
    from mindspeed_llm.training.step import BatchResult

MIB = 2**20
ITERATION = 2
ACTIVATIONS, TEMPORARY, TOGETHER = "activations", "temporary", "together"


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank.

    Attributes:
        stage: its pipeline stage.
        parts: of its activations, at the moment when they were most.
        peak: of the allocator's tensors during the iteration; None where the device keeps none.
        resident: of the process on the host.
    """

    stage: int
    weights: int
    gradients: int
    optimizer: int
    parts: Mapping[str, int]
    peak: int | None
    resident: int

    def rows(self) -> dict[str, int]:
        """Bytes by row of the report, those that were measured."""
        activations = sum(self.parts.values())
        rows = {"weights": self.weights, "gradients": self.gradients, "optimizer": self.optimizer}
        rows |= {ACTIVATIONS: activations, **{_part(name): size for name, size in self.parts.items()}}
        if self.peak is not None:
            known = self.weights + self.gradients + self.optimizer + activations
            rows |= {TEMPORARY: max(self.peak - known, 0), TOGETHER: max(self.peak, known)}
        return rows


def _part(name: str) -> str:
    return f"  {name}"


def predicted_rows(estimate: MemoryEstimate) -> dict[str, int]:
    """Bytes by row of the report."""
    rows = {"weights": estimate.weights, "gradients": estimate.gradients, "optimizer": estimate.optimizer}
    rows |= {ACTIVATIONS: estimate.activations, **{_part(name): size for name, size in estimate.parts.items()}}
    return rows | {TEMPORARY: estimate.temporary, TOGETHER: estimate.total}


def storage_bytes(tensors: Iterator[Tensor], seen: set[int]) -> int:
    """Bytes of the storages of tensors on the device, each once and none that is in `seen`, to which they are added."""
    total, device = 0, accelerator.current().device_type
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen and tensor.device.type == device:
            seen.add(storage._cdata)
            total += storage.nbytes()
    return total


def long_lived(model: TrainingModel) -> Iterator[Tensor]:
    """Parameters and buffers of the chunks; of parameters that are cut what is held here, and what is gathered now."""
    for chunk in model.chunks:
        yield from (parameter for parameter in chunk.parameters() if shard_of(parameter) is None)
        yield from chunk.buffers()
    for wrapped in model.wrapped:
        yield from (shard.main for shard in shards_of(wrapped))


def _gradients(model: TrainingModel) -> Iterator[Tensor]:
    for wrapped in model.wrapped:
        if shards := shards_of(wrapped):
            yield from (shard.gradient for shard in shards if shard.gradient is not None)
            continue
        for buffer in (*wrapped.buffers, *wrapped.expert_parallel_buffers):
            yield buffer.grad_data
    parameters = (p for chunk in model.chunks for p in chunk.parameters() if shard_of(p) is None)
    yield from (p.grad for p in parameters if p.grad is not None)


def _optimizer_state(optimizer: Any) -> Iterator[Tensor]:
    """Masters and moments on the device; what of it is a model's parameter is counted there."""
    for part in optimizer_parts(optimizer):
        if (elsewhere := getattr(part.optimizer, "elsewhere", None)) is not None:
            yield from elsewhere.device_tensors()
            continue
        for group in part.optimizer.param_groups:
            yield from group["params"]
        for state in part.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


def measure(model: TrainingModel, optimizer: Any | None, parts: Mapping[str, int], peak: int | None) -> RankMemory:
    """What this rank holds now, with activations and peak as given."""
    from megatron.core import parallel_state

    seen: set[int] = set()
    nf4 = sum(weight.num_bytes for chunk in model.chunks for weight in nf4_weights(chunk).values())
    return RankMemory(
        stage=parallel_state.get_pipeline_model_parallel_rank(),
        weights=storage_bytes(long_lived(model), seen) + nf4,
        gradients=storage_bytes(_gradients(model), seen),
        optimizer=0 if optimizer is None else storage_bytes(_optimizer_state(optimizer), seen),
        parts=dict(parts),
        peak=peak,
        resident=accelerator.current().resident_memory(),
    )


class MemoryReport(LoopHook):
    """Measures the second iteration of this process and reports it; costs nothing in any other."""

    def __init__(self, plan: Plan, model: TrainingModel) -> None:
        self._plan, self._model = plan, model
        self._steps = 0
        self._saved: SavedBytes | None = None

    def after_data(self, loop: TrainingLoop) -> None:
        """Forward and backward of an iteration begin: the second one is looked at."""
        self._steps += 1
        if self._steps == ITERATION:
            staying = itertools.chain(long_lived(self._model), *map(gathered_parameters, self._model.chunks))
            self._saved = SavedBytes(self._model.chunks, staying, self._model.swap)
            accelerator.current().reset_peak_memory()
            self._saved.begin()

    def after_backward(self, loop: TrainingLoop, result: BatchResult) -> None:
        """They have ended."""
        if self._saved is not None:
            self._saved.end()

    def end_of_iteration(self, loop: TrainingLoop) -> Wish:
        """The optimizer has stepped too: compare all ranks and report."""
        saved, self._saved = self._saved, None
        if saved is not None:
            peak = accelerator.current().peak_memory_allocated() or None
            own = measure(self._model, loop.optimizer, saved.peak, peak)
            ranks: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(ranks, own)
            self._report(loop, ranks)
        return Wish.NOTHING

    def _report(self, loop: TrainingLoop, ranks: Sequence[RankMemory]) -> None:
        found = compared(stages_memory(self._plan), ranks)
        iteration = loop.progress.iteration
        if loop.reporter is None:
            return
        loop.reporter.event("memory", {"bytes": found}, iteration)
        if is_leader():
            text = table(found, f"memory of iteration {iteration}, MiB") + resident_line(ranks)
            if loop.reporter.active:
                loop.reporter.say(text)
            else:
                print(text, flush=True)


def compared(
    predicted: Sequence[MemoryEstimate], ranks: Sequence[RankMemory], known: Sequence[str] | None = None
) -> dict[str, dict[str, int | None]]:
    """Row of the report -> what was measured, on which rank it is most, and what was predicted of that rank's stage.

    Args:
        known: rows that were measured; None for all that the ranks have, and parts of activations.

    Returns:
        For each row `predicted`, `max`, `rank`, `min`; None for what is not known.
    """
    expected = [predicted_rows(predicted[own.stage]) for own in ranks]
    measured = [own.rows() for own in ranks]
    found: dict[str, dict[str, int | None]] = {}
    for name in _in_order([*expected, *measured]):
        values = [rows.get(name, 0) for rows in measured]
        if known is None:
            has = any(name in rows for rows in measured) or name.startswith(" ")
        else:
            has = name in known
        largest = values if has else [rows.get(name, 0) for rows in expected]
        rank = largest.index(max(largest))
        found[name.strip()] = {
            "predicted": expected[rank].get(name, 0),
            "max": values[rank] if has else None,
            "rank": rank if has else None,
            "min": min(values) if has else None,
        }
    return found


def _in_order(tables: Sequence[Mapping[str, int]]) -> list[str]:
    """All rows, parts of the activations below them."""
    names = dict.fromkeys(itertools.chain.from_iterable(tables))
    parts = [name for name in names if name.startswith(" ")]
    rows = ["weights", "gradients", "optimizer", ACTIVATIONS, *parts, TEMPORARY, TOGETHER]
    return [name for name in rows if name in names]


def table(found: Mapping[str, Mapping[str, int | None]], title: str) -> str:
    """The report as aligned text."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(title, box=None, title_justify="left", pad_edge=False)
    for name in ("predicted", "measured", "on rank", "least"):
        shown.add_column(name, justify="right")
    main = ("weights", "gradients", "optimizer", ACTIVATIONS, TEMPORARY, TOGETHER)
    for name, row in found.items():
        sizes = [_mib(row[key]) for key in ("predicted", "max", "min")]
        rank = "-" if row["rank"] is None else str(row["rank"])
        shown.add_row(name if name in main else _part(name), sizes[0], sizes[1], rank, sizes[2])
    console = Console(width=100, highlight=False, color_system=None)
    with console.capture() as text:
        console.print(shown)
    return "".join(f" {line.rstrip()}\n" for line in text.get().splitlines())


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / MIB:,.1f}"


def resident_line(ranks: Sequence[RankMemory]) -> str:
    """Resident memory of the processes, with what no row of the table has."""
    sizes = [own.resident for own in ranks]
    words = f" resident on the host, Python and libraries included: {_mib(max(sizes))} MiB on rank "
    words += f"{sizes.index(max(sizes))}, least {_mib(min(sizes))}"
    return words if ranks[0].peak is not None else f"{words}; a CPU keeps no account of temporary tensors"
