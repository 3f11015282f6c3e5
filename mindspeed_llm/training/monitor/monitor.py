"""What is measured on request while a run trains, at its log lines; nothing here changes a loss or a weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch.distributed as dist

from mindspeed_llm.plan.plan import Plan
from mindspeed_llm.training.hooks import LoopHook
from mindspeed_llm.training.log_line import PARAMS_NORM, ZEROS_IN_GRADIENT
from mindspeed_llm.training.monitor.attention import MaxAttentionLogit
from mindspeed_llm.training.monitor.experts import ExpertLoad
from mindspeed_llm.training.monitor.local import LocalGradient
from mindspeed_llm.training.monitor.norms import GRADIENT_OF, WEIGHTS_OF, LayerNorms
from mindspeed_llm.training.monitor.places import PlacedChunk, Places
from mindspeed_llm.training.monitor.ranks import (
    RankReport,
    exchange,
    host_names,
    local_figures,
    stragglers,
    timing_figures,
    timing_line,
)
from mindspeed_llm.training.monitor.timing import StepClock, StepTime
from mindspeed_llm.training.setup import TrainingModel

if TYPE_CHECKING:
    from mindspeed_llm.training.loop import TrainingLoop
    from mindspeed_llm.training.step import BatchResult


class Monitor(LoopHook):
    """All that `LoggingConfig` asks to be measured. The last hook of the loop, so that its clock sees the step alone.

    Layer norms, local norms, expert load and attention logits are those of the last iteration of a log interval;
    times are means over it.
    """

    def __init__(self, plan: Plan, model: TrainingModel) -> None:
        self.plan, self.log = plan, plan.config.logging
        places = Places.of(plan.shape)
        stage = plan.layout.coordinates(dist.get_rank()).pp
        chunks = [
            PlacedChunk(wrapped, tuple(plan.layout.layers.built_layers(stage, number)), places)
            for number, wrapped in enumerate(model.wrapped)
        ]
        wanted = self.log.log_layer_norms or self.log.log_params_norm or self.log.log_num_zeros_in_grad
        self.norms = LayerNorms(chunks, places.names) if wanted else None
        self.experts = ExpertLoad(chunks, places, plan.shape.num_moe_experts) if self.log.log_expert_load else None
        self.attention = MaxAttentionLogit(chunks, places) if self.log.log_max_attention_logit else None
        self.local = LocalGradient(model.wrapped) if self.log.log_local_norms else None
        self.clock: StepClock | None = None
        self.hosts: list[str] = []
        if self.log.log_timing or self.log.straggler_threshold is not None:
            self.clock = StepClock(max(self.log.log_interval, self.log.straggler_window))
            self.hosts = host_names()
        # The first iteration warms up, so a window begins after it.
        self._compared = -1
        self._recording = False
        self._measured: dict[str, float] = {}
        self._own_loss = self._own_tokens = 0.0

    def before_batch(self, loop: TrainingLoop) -> None:
        """Decide whether this iteration is looked at, and start its clock."""
        next_iteration = loop.progress.iteration + 1
        recording = next_iteration % self.log.log_interval == 0 or next_iteration == loop.train_iters
        for watcher in (self.experts, self.attention, self.local):
            if watcher is not None:
                watcher.recording = recording
        self._recording = recording
        if self.clock is not None:
            self.clock.begin()

    def after_data(self, loop: TrainingLoop) -> None:
        """The wait for data is over."""
        if self.clock is not None:
            self.clock.have_data()

    def after_backward(self, loop: TrainingLoop, result: BatchResult) -> None:
        """Measure gradients before they are clipped, with the weights that they belong to."""
        if not self._recording:
            return
        if self.norms is not None:
            self._measured = self.norms.measure(float(loop.optimizer.get_loss_scale()))
        if self.local is not None:
            self._own_loss = float(sum(result.own_losses))
            self._own_tokens = float(result.own_trained_tokens)

    def after_step(self, loop: TrainingLoop, result: BatchResult, grad_norm: float) -> None:
        """Stop the clock."""
        if self.clock is not None:
            self.clock.end()
            self._compared += 1

    def figures(self, loop: TrainingLoop) -> Mapping[str, float]:
        """Everything measured since the last log line, for its sinks; lines about time go to the reporter."""
        found = {name: value for name, value in self._measured.items() if self._is_wanted(name)}
        if self.experts is not None:
            load, tokens = self.experts.measure()
            found |= load
            loop.reporter.event("experts", {"tokens": tokens}, loop.progress.iteration)
        if self.attention is not None:
            found |= self.attention.measure()
        if self.clock is not None or self.local is not None:
            found |= self._of_ranks(loop)
        return found

    def _is_wanted(self, name: str) -> bool:
        wanted = {PARAMS_NORM: self.log.log_params_norm, ZEROS_IN_GRADIENT: self.log.log_num_zeros_in_grad}
        by_layer = self.log.log_layer_norms and name.startswith((GRADIENT_OF, WEIGHTS_OF))
        return by_layer or wanted.get(name, False)

    def _of_ranks(self, loop: TrainingLoop) -> dict[str, float]:
        """What comes from the exchange between ranks."""
        reports = exchange(self._own_report(loop))
        found = local_figures(reports, self.plan.layout) if self.local is not None else {}
        if self.log.log_timing:
            found |= timing_figures(reports)
            loop.reporter.say(timing_line(reports, self.hosts))
        threshold, window = self.log.straggler_threshold, self.log.straggler_window
        if threshold is not None and self._compared >= window:
            self._compared = 0
            for line in stragglers(reports, self.hosts, self.plan.layout, threshold, window):
                loop.reporter.warn(line, loop.progress.iteration)
        return found

    def _own_report(self, loop: TrainingLoop) -> RankReport:
        interval = window = StepTime(0.0, 0.0, 0.0)
        if self.clock is not None:
            interval = self.clock.mean(self.log.log_interval)
            window = self.clock.mean(self.log.straggler_window)
        scale = float(loop.optimizer.get_loss_scale())
        return RankReport(
            step=interval.step,
            communication=interval.communication,
            data=interval.data,
            compute=interval.compute,
            window_compute=window.compute,
            loss=self._own_loss,
            tokens=self._own_tokens,
            square_norm=self.local.square_norm / scale**2 if self.local is not None else 0.0,
        )

    def close(self) -> None:
        """Leave model and collectives as they were."""
        for part in (self.experts, self.attention, self.local, self.clock):
            if part is not None:
                part.close()
