"""A training run from its plan: model, optimizer, data, resume, loop, checkpoints."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mindspeed_llm import __version__
from mindspeed_llm.checkpoint.optimizer_state import optimizer_parts
from mindspeed_llm.errors import UserError
from mindspeed_llm.parallel.launch import check_agreement
from mindspeed_llm.parallel.shards import local_values
from mindspeed_llm.parallel.watch import Watch, watched
from mindspeed_llm.plan.plan import Plan
from mindspeed_llm.plan.running import peak_learning_rate
from mindspeed_llm.plan.show import show_adapters
from mindspeed_llm.training.build_options import DTYPES
from mindspeed_llm.training.data import TrainingData, evaluation_iterations
from mindspeed_llm.training.data_lines import data_lines
from mindspeed_llm.training.dying import DyingBreath
from mindspeed_llm.training.evaluate import Evaluation, evaluate
from mindspeed_llm.training.guards.guards import Guards
from mindspeed_llm.training.hooks import LoopHook
from mindspeed_llm.training.intact import with_intact_checkpoint
from mindspeed_llm.training.length import train_iterations
from mindspeed_llm.training.loop import Progress, TrainingLoop
from mindspeed_llm.training.memory_report import MemoryReport
from mindspeed_llm.training.monitor.monitor import Monitor
from mindspeed_llm.training.monitor.saves import SaveEvents
from mindspeed_llm.training.monitor.sinks import open_sinks
from mindspeed_llm.training.optimizer import build_optimizer, build_scheduler
from mindspeed_llm.training.out_of_memory import OutOfMemoryAdvice
from mindspeed_llm.training.profiling import Profiler
from mindspeed_llm.training.report import LossHistory, Reporter
from mindspeed_llm.training.resume import go_back, resume
from mindspeed_llm.training.saving import Saver, SaveSchedule
from mindspeed_llm.training.setup import TrainingModel, build, is_leader, is_logger, start_processes
from mindspeed_llm.training.standing import Standing
from mindspeed_llm.training.stopping import StopRequest


@dataclass
class RunResult:
    """What a run ended with; the losses are known to the logging rank (the last) only.

    Attributes:
        evaluation: of `--eval-only`.
        checkpoint: the last directory written, None without --save.
        stopped: why the run ended before its last iteration; None when nobody asked it to.
    """

    progress: Progress
    history: LossHistory
    evaluation: Evaluation | None
    checkpoint: Path | None
    stopped: str | None = None


def run_training(plan: Plan, prefixes: Sequence[str], pad_token_id: int) -> RunResult:
    """Train (or with --eval-only evaluate) as planned.

    Args:
        prefixes: preprocessed data, one for each set of `--data-path`.
        pad_token_id: fills what collation rounds up.
    """
    start_processes(plan)
    plan = with_intact_checkpoint(plan)
    stop = StopRequest()
    with stop.listening() if takes_signals(plan) else nullcontext(), watched(**watch_settings(plan)) as watch:
        return _train(plan, prefixes, pad_token_id, stop, watch)


def takes_signals(plan: Plan) -> bool:
    """Whether a signal is a request to save and leave; without a place to save to it ends the process at once."""
    return plan.config.checkpoint.save is not None and plan.config.runtime.exit_signal_handler


def watch_settings(plan: Plan) -> dict[str, Any]:
    """Arguments of `watched`."""
    runtime, save = plan.config.runtime, plan.config.checkpoint.save
    return {
        "timeout_minutes": runtime.distributed_timeout_minutes,
        "hang_seconds": runtime.hang_timeout,
        "logs": Path(save) / "logs" if save else None,
    }


def _train(plan: Plan, prefixes: Sequence[str], pad_token_id: int, stop: StopRequest, watch: Watch | None) -> RunResult:
    data = TrainingData(plan, prefixes, pad_token_id)
    if data.train or data.valid:
        check_agreement({"data files": data.fingerprint()}, "data")
    advice = OutOfMemoryAdvice(plan, watch.tell, watch.saying) if watch else OutOfMemoryAdvice(plan)
    with advice.explaining():
        advice.model = model = build(plan)
    if plan.config.training.eval_only:
        with advice.explaining():
            return _evaluate_only(plan, model, data)
    train_iters = train_iterations(plan.config.training, plan.global_batch_size, data.samples_per_epoch)
    with advice.explaining():
        optimizer, scheduler = make_optimizer(plan, model, train_iters)
        advice.optimizer = optimizer
        progress = resume(plan, model, optimizer, scheduler, data) if plan.resume else Progress()
    _say_start(plan, model, data, train_iters, progress)
    reporter = make_reporter(plan, train_iters, progress.iteration)
    schedule, events, monitor = SaveSchedule(plan.config), SaveEvents(reporter), Monitor(plan, model)
    profiler = Profiler(plan.config.profiling)
    hooks: list[LoopHook] = [stop, schedule, events, monitor, profiler]
    if plan.config.logging.memory_report:
        hooks.append(MemoryReport(plan, model))
    saver, save, changing = None, None, nullcontext
    if plan.config.checkpoint.save:
        saver = Saver(plan, model, optimizer, scheduler, data)
        saver.health = lambda: {"healthy": not progress.ailments, "reasons": progress.ailments}
        save = partial(save_and_tell, saver, events)
        if watch:
            standing = outlive_ranks(plan, saver, watch)
            changing = standing.changing
            hooks.append(standing)
        hooks.append(saver)
    restore = partial(go_back, plan, model, optimizer, scheduler, data, saver, changing)
    guards = Guards(plan, model, data, restore)
    guards.recall(progress)
    loop = TrainingLoop(plan, model, optimizer, scheduler, data, reporter, progress, train_iters, save, hooks, guards)
    try:
        with orderly_end(saver, watch), advice.explaining():
            loop.run()
        events.look()
        profiler.close(progress.iteration)
    finally:
        profiler.abandon()
        monitor.close()
        reporter.close(plan.config.logging.loss_curve)
    reason, last = stop.reason or schedule.reason, saver.last if saver else None
    if reason and is_leader():
        print(f" stopped after iteration {progress.iteration} by {reason}: saved to {last or 'nowhere'}", flush=True)
    return RunResult(progress, reporter.history, None, last, reason)


def outlive_ranks(plan: Plan, saver: Saver, watch: Watch) -> Standing:
    """Let the ranks that are left after a failure save; the hook that knows of which iteration the state is."""
    standing = Standing(watch.rank, watch.store)
    watch.will = DyingBreath(saver, standing, plan.layout, watch.rank, watch.store)
    watch.will.announce()
    return standing


@contextmanager
def orderly_end(saver: Saver | None, watch: Watch | None) -> Iterator[None]:
    """Run the body; then wait for a save in the background, and after a failure tell the others first."""
    try:
        yield
        if saver:
            saver.finish()
    except Exception as error:
        if watch:  # the others wait for this rank while it closes its files
            watch.tell(error)
        if saver:
            saver.settle()
        raise


def save_and_tell(saver: Saver, events: SaveEvents, progress: Progress) -> None:
    """Save, and have the sinks told when the checkpoint is complete."""
    saver(progress)
    events.begun(progress.iteration, saver.last)


def make_reporter(plan: Plan, train_iters: int, done: int) -> Reporter:
    """The reporter of a run that goes on after `done` iterations; its sinks know how the run began."""

    def warn(text: str) -> None:
        print(f"warning: {text}", flush=True)

    sinks = open_sinks(plan, done, warn) if is_logger() else []
    reporter = Reporter(
        active=is_logger(), progress=plan.config.logging.progress, train_iters=train_iters, done=done, sinks=sinks
    )
    facts = {"train_iters": train_iters, "world_size": plan.world_size, "host": socket.gethostname()}
    reporter.event("start", {**facts, "version": __version__})
    return reporter


def make_optimizer(plan: Plan, model: TrainingModel, train_iters: int) -> tuple[Any, Any]:
    """Optimizer and schedule over what is trained."""
    c = plan.config
    learning_rate = peak_learning_rate(c, adapted=plan.adapters is not None)
    optimizer = build_optimizer(
        c.optimizer,
        model.wrapped,
        learning_rate=learning_rate,
        dtype=torch.float32 if c.parallel.use_torch_fsdp2 else DTYPES[plan.dtype_name],
        distributed=c.parallel.use_distributed_optimizer,
        overlap_param_gather=c.parallel.overlap_param_gather,
        loraplus_lr_ratio=1.0 if plan.adapters is None else plan.adapters.loraplus_lr_ratio,
        memory=c.memory,
    )
    if c.parallel.use_torch_fsdp2:
        from mindspeed_llm.training.fully_sharded import shard_optimizer

        shard_optimizer(optimizer_parts(optimizer))
    if plan.dtype_name == "fp16":
        # The schedules multiply the loss by it; the optimizer divides the gradients again.
        model.chunks[0].config.grad_scale_func = optimizer.scale_loss
    scheduler = build_scheduler(
        c.optimizer,
        optimizer,
        learning_rate=learning_rate,
        # A last batch that is not full is not trained on, but counts for the decay.
        train_samples=c.training.train_samples or train_iters * plan.global_batch_size,
        global_batch_size=plan.global_batch_size,
    )
    return optimizer, scheduler


def _evaluate_only(plan: Plan, model: TrainingModel, data: TrainingData) -> RunResult:
    iterations = evaluation_iterations(data, plan.config.training.eval_iters)
    if iterations == 0:
        raise UserError("--eval-only: the validation part is empty; try: another --split, or --eval-iters above 0")
    found = evaluate(model.wrapped, data, plan, iterations)
    reporter = Reporter(active=is_logger(), progress="lines", train_iters=0, done=0)
    source = plan.adapter_source or plan.weights
    iteration = source.record.get("progress", {}).get("iteration", 0) if source else 0
    reporter.evaluation(iteration, found.loss, found.trained_tokens)
    return RunResult(Progress(), reporter.history, found, None)


def _say_start(plan: Plan, model: TrainingModel, data: TrainingData, train_iters: int, progress: Progress) -> None:
    """One block of facts before the first iteration, on rank 0."""
    from mindspeed_llm.models.nf4_weight import nf4_weights

    held = [(p.requires_grad, local_values(p).numel()) for chunk in model.chunks for p in chunk.parameters()]
    trained, total = sum(number for is_trained, number in held if is_trained), sum(number for _, number in held)
    total += sum(weight.numel() for chunk in model.chunks for weight in nf4_weights(chunk).values())
    if not is_leader():
        return
    start = f"resuming at iteration {progress.iteration}" if progress.iteration else "starting"
    print(
        f" {start}: {train_iters} iterations of {plan.global_batch_size} samples, {data.samples_per_epoch} samples "
        f"per epoch; {trained:,} of {total:,} parameters on this rank are trained in {plan.dtype_name}",
        flush=True,
    )
    if plan.adapters is not None:
        show_adapters(plan)
    for line in data_lines(data, progress, train_iters):
        print(line, flush=True)
    if evaluation_iterations(data, plan.config.training.eval_iters) == 0:
        print(" no validation: the split leaves no whole sample for it", flush=True)
