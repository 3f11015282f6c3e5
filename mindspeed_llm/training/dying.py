"""The dying breath: a checkpoint of the last finished iteration, written by the ranks that are left after a failure.

Every part of the state is held by several ranks when there is data parallelism, or by its own rank, which may have
raised and still be there. Who writes what is decided by place in the layout, nobody gathers, and no collective is used,
since training threads may stand in one that a dead rank has broken: all of this runs in the watch's thread.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspeed_llm import accelerator
from mindspeed_llm.checkpoint import directory
from mindspeed_llm.checkpoint.boxes import Box, own_share
from mindspeed_llm.checkpoint.train_record import iteration_directory, read_tracker
from mindspeed_llm.checkpoint.train_save import SaveOrder, index_and_complete
from mindspeed_llm.checkpoint.write_part import write_part
from mindspeed_llm.config.parallel import ParallelConfig
from mindspeed_llm.parallel.layout import ParallelLayout
from mindspeed_llm.training.setup import is_leader
from mindspeed_llm.training.standing import Finished, Standing

if TYPE_CHECKING:
    from mindspeed_llm.training.saving import Saver


class DyingOrder(SaveOrder):
    """A checkpoint by the ranks that are left, aside of a regular one that training threads may be writing."""

    @property
    def aside(self) -> Path:
        """Where it is written before it is complete."""
        return directory.dying_aside_of(self.root, self.iteration)


@dataclass(frozen=True)
class DyingBreath:
    """What the ranks that are left can save: a `parallel.survivors.LastWill`.

    Args:
        store: any torch.distributed store that all ranks share.
    """

    saver: Saver
    standing: Standing
    layout: ParallelLayout
    rank: int
    store: Any

    def announce(self) -> None:
        """Tell what the first rank alone knows; it may not be among those that are left."""
        if is_leader():
            self.store.set("base", json.dumps(self.saver.base))

    def freeze(self, seconds: float) -> int | None:
        """See `Standing.freeze`; a save in the background ends first, or is given up."""
        if self.saver.background is not None:
            self.saver.background.give_up(seconds)
        return self.standing.freeze(seconds)

    def decide(self, finished: Mapping[int, int | None]) -> dict[str, Any]:
        """The latest iteration of which the ranks that are left hold every part, and who writes.

        Args:
            finished: rank -> its last finished iteration; None in the middle of an update.
        """
        if self.saver.plan.config.checkpoint.no_save_optim:
            return {"reason": "nothing is saved, because --no-save-optim leaves out what a resume needs"}
        parallel = self.saver.plan.config.parallel
        if parallel.overlap_param_gather:
            return {"reason": "nothing is saved, because --overlap-param-gather gathers weights in the next iteration"}
        spread = is_spread(parallel)
        for iteration in sorted({n for n in finished.values() if n is not None}, reverse=True):
            holders = find_holders(self.layout, [r for r, n in finished.items() if n == iteration], spread)
            if holders:
                return self._already(iteration) or {"iteration": iteration, "holders": holders}
        state = "model" if parallel.use_torch_fsdp2 else "optimizer's state"
        where = f"of the {state}, which each rank holds a share of," if spread else "of the model"
        return {"reason": f"nothing is saved, because parts {where} are gone; the checkpoint before stays"}

    def _already(self, iteration: int) -> dict[str, str] | None:
        """Why there is nothing to save of an iteration."""
        root = Path(self.saver.plan.config.checkpoint.save)
        there = iteration_directory(root, iteration)
        if iteration == 0:
            return {"reason": "nothing is saved, because no iteration was finished"}
        if read_tracker(root) == str(iteration) and directory.is_complete(there):
            return {"reason": f"iteration {iteration} had been saved to {there}"}
        return None

    def prepare(self, decision: Mapping[str, Any]) -> None:
        """Make the directory that all write into."""
        aside = directory.dying_aside_of(self.saver.plan.config.checkpoint.save, decision["iteration"])
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)

    def write(self, decision: Mapping[str, Any]) -> None:
        """Write what is held here, replicas of lost parts included, and (the judge) everybody's random states."""
        finished, device = self.standing.finished, accelerator.current()
        if finished.device.index is not None:  # each thread has a current device of its own
            device.set_device(finished.device.index)
        # The training thread's stream may wait for a collective that never ends; the state was there before.
        stream = device.new_stream()
        stream.wait_event(finished.ready)
        with device.stream(stream):
            self._write(decision, finished)

    def _write(self, decision: Mapping[str, Any], finished: Finished) -> None:
        iteration, boxes, facts, objects = decision["iteration"], [], {}, {}
        if self.rank in decision["holders"]:
            spread = is_spread(self.saver.plan.config.parallel)
            state = self.saver.state(rng=None)
            facts = state.facts | {"grad_scaler": finished.grad_scaler}
            objects = state.packed_objects()
            boxes = [as_finished(box, finished) for box in state.boxes]
            # A spread state has all ranks there; otherwise one of those that hold the same writes all of it.
            boxes = own_share(boxes) if spread else [box for box in boxes if stands_for_main(box)]
            common = {"progress": asdict(finished.progress), "opt_param_scheduler": finished.scheduler}
            self.store.set(f"common/{iteration}", json.dumps(common))
        if self.rank == decision["judge"]:
            objects = objects | self._streams(iteration)
        aside = directory.dying_aside_of(self.saver.plan.config.checkpoint.save, iteration)
        write_part(aside, self.rank, boxes, objects, facts)

    def complete(self, decision: Mapping[str, Any]) -> str:
        """Make a checkpoint of what was written; its directory."""
        iteration, ranks = decision["iteration"], sorted({*decision["holders"], decision["judge"]})
        common = json.loads(self.store.get(f"common/{iteration}"))
        self.saver.base = json.loads(self.store.get("base"))
        order = self.saver.order(type(self.standing.finished.progress)(**common.pop("progress")))
        order.record["random_states"] = len(self._streams(iteration)) == self.layout.world_size
        order = DyingOrder(**vars(order))
        with directory.discarding(order.aside):
            return str(index_and_complete(order, ranks, common))

    def _streams(self, iteration: int) -> dict[str, bytes]:
        """Random states of all ranks after an iteration, those excepted that did not tell them."""
        found, finished = {}, self.standing.finished
        told_as = finished.streams_of if finished.progress.iteration == iteration else iteration
        for rank in range(self.layout.world_size):
            found |= self.standing.streams_of(rank, told_as)
        return found


def is_spread(parallel: ParallelConfig) -> bool:
    """Whether every data-parallel rank holds a share of the state of its own."""
    return parallel.use_distributed_optimizer or parallel.use_torch_fsdp2


def find_holders(layout: ParallelLayout, ranks: Iterable[int], spread: bool) -> list[int]:
    """Ranks among `ranks` that hold every part of the model together, as few as possible; none if they do not.

    Args:
        spread: every rank holds a share of its own, as of a distributed optimizer's state.
    """
    ranks = sorted(ranks)
    if spread:
        return ranks if len(ranks) == layout.world_size else []
    missing = {part for rank in range(layout.world_size) for part in parts_of(layout, rank)}
    holders = []
    for rank in ranks:
        if here := missing & parts_of(layout, rank):
            holders.append(rank)
            missing -= here
    return [] if missing else holders


def parts_of(layout: ParallelLayout, rank: int) -> set[tuple]:
    """Which parts of the model a rank holds; data-parallel ranks hold the same."""
    here = layout.coordinates(rank)
    return {("dense", here.pp, here.tp), ("experts", here.pp, here.ep, here.etp)}


def stands_for_main(box: Box) -> bool:
    """Whether a box is the one that is written, or its replica on another data-parallel rank."""
    ids = (box.replica_id,) if isinstance(box.replica_id, int) else box.replica_id[:-1]
    return not any(ids)


def as_finished(box: Box, finished: Finished) -> Box:
    """The box with the values of the finished iteration: a buffer's are in a copy."""
    copy = finished.buffers.get(box.tensor.data_ptr())
    return box if copy is None or not copy.numel() else replace(box, tensor=copy.view(box.shape))
