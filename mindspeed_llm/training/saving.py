"""When a run saves, whether there is room for it, and what stands in the record beside the tensors."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from mindspeed_llm import __version__, accelerator
from mindspeed_llm.checkpoint.directory import iterations
from mindspeed_llm.checkpoint.space import in_units, probe, space_problem
from mindspeed_llm.checkpoint.train_record import HF_FILES
from mindspeed_llm.config.run import RunConfig
from mindspeed_llm.errors import UserError
from mindspeed_llm.parallel.exact_sum import sum_float64
from mindspeed_llm.plan.base import base_record
from mindspeed_llm.plan.continuity import recorded_options
from mindspeed_llm.plan.plan import Plan
from mindspeed_llm.plan.restart import started_from
from mindspeed_llm.training.build_options import DTYPES
from mindspeed_llm.training.data import TrainingData
from mindspeed_llm.training.hf_export import HfExport
from mindspeed_llm.training.hooks import LoopHook, Wish
from mindspeed_llm.training.own_hf_files import make_hf_files
from mindspeed_llm.training.setup import TrainingModel, gather_parameters, is_leader

if TYPE_CHECKING:
    from mindspeed_llm.checkpoint.async_save import AsyncSave
    from mindspeed_llm.checkpoint.train_save import SaveOrder
    from mindspeed_llm.checkpoint.training_state import TrainingState
    from mindspeed_llm.training.loop import Progress, TrainingLoop
    from mindspeed_llm.training.step import BatchResult

SECONDS_A_MINUTE = 60.0
# After a failure a save in the background gets this long to end.
SETTLE_SECONDS = 30.0
# While a save waits for an export, the ranks speak to each other this often.
EXPORT_SECONDS = 30.0


class SaveSchedule(LoopHook):
    """When checkpoints are due, and when the run has lasted long enough.

    Iterations are counted by every rank; the clock is the first rank's, who tells the others with the loss.
    """

    def __init__(self, config: RunConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.every, self.lasting = config.checkpoint.save_interval, config.training.exit_duration_in_mins
        self.exit_interval, self.clock = config.training.exit_interval, clock
        self.started = self.saved = clock()
        self.reason: str | None = None
        self._told: Mapping[str, float] = {}

    def flags(self) -> Mapping[str, float]:
        """What the first rank's clock says, if anybody asked for minutes."""
        due = {}
        if self.every is not None and self.every.minutes is not None:
            due["save due"] = float(is_leader() and self._minutes_since(self.saved) >= self.every.minutes)
        if self.lasting is not None:
            due["time is up"] = float(is_leader() and self._minutes_since(self.started) >= self.lasting)
        return due

    def after_backward(self, loop: TrainingLoop, result: BatchResult) -> None:
        """Hear the clock."""
        self._told = result.flags

    def end_of_iteration(self, loop: TrainingLoop) -> Wish:
        """Save, leave (which saves), both or nothing."""
        now, wish = loop.progress.iteration, Wish.NOTHING
        counted = self.every is not None and self.every.iterations is not None and now % self.every.iterations == 0
        if counted or self._told.get("save due"):
            self.saved = self.clock()
            wish |= Wish.SAVE
        if self.exit_interval and now % self.exit_interval == 0:
            self.reason = f"--exit-interval {self.exit_interval}"
        elif self._told.get("time is up"):
            self.reason = f"--exit-duration-in-mins {self.lasting:g}"
        return wish | Wish.LEAVE if self.reason else wish

    def _minutes_since(self, moment: float) -> float:
        return (self.clock() - moment) / SECONDS_A_MINUTE


class Saver(LoopHook):
    """Writes checkpoints of a run: adapters alone for LoRA, everything otherwise.

    As a hook it notices between iterations that a save in the background has failed.

    Attributes:
        last: the directory written last.
        health: what the guards say of the state at hand, for its record; None when none looks.

    Raises:
        UserError: `--save` cannot be written to, or has no room for a checkpoint.
    """

    def __init__(self, plan: Plan, model: TrainingModel, optimizer: Any, scheduler: Any, data: TrainingData) -> None:
        from mindspeed_llm.checkpoint.training_state import bytes_to_write

        self.plan, self.model, self.optimizer, self.scheduler, self.data = plan, model, optimizer, scheduler, data
        self.root = Path(plan.config.checkpoint.save)
        self.last: Path | None = None
        self.made = make_hf_files(plan) if is_leader() else None
        self.health: Callable[[], dict[str, Any]] | None = None
        self.base = base_record_of(plan) if is_leader() else None
        self.started_from = started_from(plan)
        outline = self.state(None, outlines=True)
        self.num_bytes = bytes_of_all_ranks(bytes_to_write(outline))
        refuse_together(self._room_problem)
        self.background = self._background(outline) if plan.config.checkpoint.async_save else None
        self.export = HfExport(plan) if plan.config.checkpoint.save_hf_each_checkpoint and is_leader() else None

    def __call__(self, progress: Progress) -> None:
        """Save the state after `progress.iteration`."""
        from mindspeed_llm.checkpoint.train_save import save_training
        from mindspeed_llm.checkpoint.training_state import rng_states

        refuse_together(lambda: space_problem(self.root, self.num_bytes, "a checkpoint's files"))
        if self.plan.config.checkpoint.save_hf_each_checkpoint:
            self._let_export_end()
        gather_parameters(self.model)
        state, order = self.state(rng_states()), self.order(progress)
        if self.background is not None:
            self.background.start(order, state)
        else:
            save_training(order, state)
            self._completed(order)
        self.last = order.final

    def before_batch(self, loop: TrainingLoop) -> None:
        """Stop the run when the checkpoint or export that it believes to be under way will never come."""
        for beside in (self.background, self.export):
            if beside is not None:
                beside.check()

    def finish(self) -> None:
        """Wait until the last checkpoint is complete, and what is exported of it.

        Raises:
            UserError: it could not be written.
        """
        for beside in (self.background, self.export):
            if beside is not None:
                beside.wait()

    def settle(self) -> None:
        """Let a save in the background end, on the way out after a failure of something else."""
        for beside in (self.background, self.export):
            try:
                if beside is not None:
                    beside.wait(SETTLE_SECONDS)
            except Exception as failed:  # whatever it is, what the run failed with counts
                print(f"warning: {failed}", flush=True)

    def _let_export_end(self) -> None:
        """Wait for what the first rank exports: the checkpoint that it reads may be removed by the next one.

        The other ranks hear of it again and again, so that an export may take longer than a collective.
        """
        busy = True
        while busy:
            if self.export is not None:
                if self.background is not None:
                    self.background.wait()  # what is under way will be exported too
                self.export.wait(EXPORT_SECONDS)
            told = [self.export is not None and self.export.is_busy()]
            dist.broadcast_object_list(told, src=0)
            busy = told[0]

    def _background(self, outline: TrainingState) -> AsyncSave:
        from mindspeed_llm.checkpoint.async_save import AsyncSave

        background = AsyncSave(self._completed)
        background.reserve(outline)
        return background

    def _completed(self, order: SaveOrder) -> None:
        if is_leader():
            resumable = not self.plan.config.checkpoint.no_save_optim
            note = "" if resumable else " (no optimizer state: it can be tuned from, not resumed)"
            print(f" saved checkpoint at iteration {order.iteration} to {order.final}{note}", flush=True)
        if self.export is not None:
            self.export.start()

    def state(self, rng: Mapping[str, Any] | None, outlines: bool = False) -> TrainingState:
        """What this rank holds; needs no other rank. `outlines`: of the optimizer's state only how large it is."""
        from mindspeed_llm.checkpoint.training_state import training_state

        c = self.plan.config.checkpoint
        return training_state(
            self.model.chunks,
            None if c.no_save_optim else self.optimizer,
            None if c.no_save_optim else self.scheduler,
            self.model.trained if self.plan.adapters is not None else None,
            rng=rng,
            outlines=outlines,
        )

    def order(self, progress: Progress) -> SaveOrder:
        """What a checkpoint of the state after `progress.iteration` is to be like."""
        from mindspeed_llm.checkpoint.train_save import SaveOrder

        c = self.plan.config.checkpoint
        return SaveOrder(
            c.save,
            progress.iteration,
            self.record(progress),
            self.hf_files(),
            keep_last=c.keep_last,
            read_back=c.verify_checkpoint in ("save", "both"),
        )

    def hf_files(self) -> Path | None:
        """Config and tokenizer files: the plan's, or the last checkpoint's copy once the resumed one is removed; those
        made from flags where the plan has none."""
        files = self.plan.hf_files
        if files is None:
            return None if self.made is None else Path(self.made.name)
        return files if files is None or files.is_dir() or self.last is None else self.last / HF_FILES

    def record(self, progress: Progress) -> dict[str, Any]:
        """What is written beside the tensors."""
        plan = self.plan
        return {
            "format": "torch_dist",
            "version": __version__,
            "iteration": progress.iteration,
            "progress": asdict(progress),
            "resumable": not plan.config.checkpoint.no_save_optim,
            "shape": plan.shape.to_json(),
            "adapters": plan.adapters.to_json() if plan.adapters else None,
            "base": self.base,
            "started_from": self.started_from,
            "layout": layout_record(plan),
            "dtype": plan.dtype_name,
            "data": self.data.fingerprint(),
            "continuity": plan.config.of_kind("continuity") | {"global_batch_size": plan.global_batch_size},
            "options": recorded_options(plan.config),
            "health": self.health() if self.health is not None else None,
            "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        }

    def _room_problem(self) -> str | None:
        """Why the run could not save: the newest checkpoint is complete before the oldest one goes."""
        probe(self.root)
        c, there = self.plan.config.checkpoint, len(iterations(self.root))
        more = 1 if c.keep_last is None else max(c.keep_last + 1 - there, 1)
        what = f"{more} checkpoint{'s' * (more > 1)} of {in_units(self.num_bytes)}"
        needed = more * self.num_bytes
        if c.save_hf:
            exported = self.plan.shape.num_parameters() * DTYPES[self.plan.dtype_name].itemsize
            # A renewed one is complete before the one before it goes.
            exported *= 1 + c.save_hf_each_checkpoint
            what, needed = f"{what} and a Hugging Face model of {in_units(exported)}", needed + exported
        return space_problem(self.root, needed, what)


def bytes_of_all_ranks(own: int) -> int:
    """Sum of what each rank writes."""
    total = torch.tensor(float(own), dtype=torch.float64, device=accelerator.current().current_device())
    sum_float64(total)
    return int(total)


def refuse_together(problem: Callable[[], str | None]) -> None:
    """Ask on the first rank, refuse on all.

    Raises:
        UserError: there is a problem; every rank raises it.
    """
    found: list[str | None] = [None]
    if is_leader():
        try:
            found = [problem()]
        except UserError as wrong:
            found = [str(wrong)]
    dist.broadcast_object_list(found, src=0)
    if found[0] is not None:
        raise UserError(found[0])


def base_record_of(plan: Plan) -> dict[str, Any] | None:
    """What a checkpoint says about the weights that the run started from."""
    return base_record(plan.weights, plan.stored_shape, plan.adapters is not None, plan.quantized)


def layout_record(plan: Plan) -> dict[str, int]:
    """What a checkpoint says about the layout that wrote it."""
    return {
        "tensor_parallel": plan.tensor_parallel_size,
        "pipeline_parallel": plan.pipeline_parallel_size,
        "context_parallel": plan.layout.cp,
        "data_parallel": plan.data_parallel_size,
        "expert_parallel": plan.layout.ep,
        "expert_tensor_parallel": plan.layout.expert_tp,
    }
