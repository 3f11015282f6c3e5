"""Where figures go: one interface, the same names everywhere, and no failure of a sink ends the training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from mindspeed_llm.config.run import RunConfig
    from mindspeed_llm.plan.plan import Plan


class Sink(Protocol):
    """One place that figures go to."""

    def write(self, iteration: int, figures: Mapping[str, float]) -> None:
        """Figures after `iteration`, by name."""

    def event(self, kind: str, iteration: int, facts: Mapping[str, Any]) -> None:
        """Something that is not a figure: a start, a warning, a checkpoint; not every sink has a place for it."""

    def rewind(self, iteration: int) -> None:
        """What was written about later iterations did not happen: the run goes on after `iteration`."""

    def close(self) -> None:
        """Write what is still held back."""


class Guarded(Sink):
    """A sink that never raises: a full disk or a lost network costs figures, not the training.

    Args:
        name: of the sink in the warning, which is given once.
        open_sink: makes the sink; it may fail too.
        warn: prints a line.
    """

    def __init__(self, name: str, open_sink: Callable[[], Sink], warn: Callable[[str], None]) -> None:
        self.name, self._warn, self._warned = name, warn, False
        self._sink: Sink | None = None
        self._sink = self._try(open_sink)

    def _try(self, action: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return action(*arguments)
        except Exception as failure:  # whatever a client of a network service may raise
            if not self._warned:
                self._warned = True
                why = " ".join(f"{type(failure).__name__}: {failure}".split())
                lost = "nothing is written there" if self._sink is None else "figures are missing there"
                self._warn(f"{self.name}: {lost}, training goes on, because {why}")
            return None

    def write(self, iteration: int, figures: Mapping[str, float]) -> None:
        if self._sink is not None:
            self._try(self._sink.write, iteration, figures)

    def event(self, kind: str, iteration: int, facts: Mapping[str, Any]) -> None:
        if self._sink is not None:
            self._try(self._sink.event, kind, iteration, facts)

    def rewind(self, iteration: int) -> None:
        if self._sink is not None:
            self._try(self._sink.rewind, iteration)

    def close(self) -> None:
        if self._sink is not None:
            self._try(self._sink.close)


def open_sinks(plan: Plan, done: int, warn: Callable[[str], None]) -> list[Guarded]:
    """The sinks that the options ask for.

    Args:
        done: iterations before this run; what the sinks hold about later ones is superseded.
        warn: prints a line about a sink that fails.
    """
    from mindspeed_llm.training.monitor import services
    from mindspeed_llm.training.monitor.jsonl import JsonLines

    log, settings = plan.config.logging, plan.config.to_json()
    file = metrics_file(plan.config)
    makers: dict[str, Callable[[], Sink]] = {}
    if file is not None:
        makers[str(file)] = lambda: JsonLines(file, done)
    if log.tensorboard_dir is not None:
        makers["TensorBoard"] = lambda: services.TensorBoard(log.tensorboard_dir, done)
    if log.wandb_project is not None:
        directory = own_directory(plan.config, log.wandb_save_dir, "wandb")
        names = (log.wandb_project, log.wandb_exp_name, log.wandb_entity)
        makers["W&B"] = lambda: services.WeightsAndBiases(*names, directory, settings)
    if log.swanlab_project is not None:
        directory_of_swanlab = own_directory(plan.config, log.swanlab_save_dir, "swanlab")
        others = (log.swanlab_project, log.swanlab_exp_name, log.swanlab_workspace)
        makers["SwanLab"] = lambda: services.SwanLab(*others, directory_of_swanlab, settings)
    return [Guarded(name, maker, warn) for name, maker in makers.items()]


def metrics_file(config: RunConfig) -> Path | None:
    """The JSONL file of a run: --metrics-jsonl, or metrics.jsonl in --save; None without either."""
    if config.logging.metrics_jsonl is not None:
        return Path(config.logging.metrics_jsonl)
    return None if config.checkpoint.save is None else Path(config.checkpoint.save) / "metrics.jsonl"


def own_directory(config: RunConfig, asked: str | None, name: str) -> Path:
    """Where a service's client keeps its own files."""
    if asked is not None:
        return Path(asked)
    return Path(config.checkpoint.save) / name if config.checkpoint.save is not None else Path.cwd()
