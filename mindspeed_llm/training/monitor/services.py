"""Figures for TensorBoard, Weights & Biases and SwanLab; see `monitor.sinks`.

A service cannot take back what it has got. TensorBoard hides steps after the one that a file begins with; W&B and
SwanLab get a run of its own for every start, so a resume or a rewind does not mix with what was there before.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mindspeed_llm.training.monitor.sinks import Sink


class TensorBoard(Sink):
    """Event files in a directory."""

    def __init__(self, directory: str, done: int) -> None:
        self.directory = directory
        self.rewind(done)

    def write(self, iteration: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, iteration)

    def event(self, kind: str, iteration: int, facts: Mapping[str, Any]) -> None:
        if kind == "warning":
            self.writer.add_text("warnings", str(facts["text"]), iteration)

    def rewind(self, iteration: int) -> None:
        """Begin a file that hides what earlier files hold about later iterations."""
        from torch.utils.tensorboard import SummaryWriter

        if hasattr(self, "writer"):
            self.writer.close()
        self.writer = SummaryWriter(self.directory, purge_step=iteration + 1)

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases(Sink):
    """A run of a W&B project; WANDB_MODE=offline keeps it in `directory`. Source: docs.wandb.ai/ref/python."""

    def __init__(
        self, project: str, name: str | None, entity: str | None, directory: Path, settings: Mapping[str, Any]
    ) -> None:
        import wandb

        directory.mkdir(parents=True, exist_ok=True)
        self.run = wandb.init(
            project=project, name=name, group=name, entity=entity, dir=str(directory), config=dict(settings)
        )
        # Steps of its own may not go back; figures over an iteration may.
        self.run.define_metric("*", step_metric="iteration")
        self.alert_level = wandb.AlertLevel.WARN

    def write(self, iteration: int, figures: Mapping[str, float]) -> None:
        self.run.log({"iteration": iteration, **figures})

    def event(self, kind: str, iteration: int, facts: Mapping[str, Any]) -> None:
        if kind == "warning":
            self.run.alert(f"iteration {iteration}", str(facts["text"]), level=self.alert_level)

    def rewind(self, iteration: int) -> None:
        """Repeated iterations stand beside what they supersede."""

    def close(self) -> None:
        self.run.finish()


class SwanLab(Sink):
    """An experiment of a SwanLab project; SWANLAB_MODE=offline or local keeps it in `directory`.

    Source: docs.swanlab.cn/api/py-init.html.
    """

    def __init__(
        self, project: str, name: str | None, workspace: str | None, directory: Path, settings: Mapping[str, Any]
    ) -> None:
        import swanlab

        directory.mkdir(parents=True, exist_ok=True)
        self.run = swanlab.init(
            project=project, name=name, workspace=workspace, log_dir=str(directory), config=dict(settings)
        )

    def write(self, iteration: int, figures: Mapping[str, float]) -> None:
        self.run.log(dict(figures), step=iteration)

    def event(self, kind: str, iteration: int, facts: Mapping[str, Any]) -> None:
        """SwanLab has charts alone."""

    def rewind(self, iteration: int) -> None:
        """SwanLab keeps the first figure of a step."""

    def close(self) -> None:
        self.run.finish()
