"""The configuration of a run: its sections, the table of all options, and where each value came from."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from mindspeed_llm.config.checkpoint import CheckpointConfig
from mindspeed_llm.config.convert import ConvertConfig
from mindspeed_llm.config.data import EVERY_DATA_DOOR, DataConfig, TokenizerConfig
from mindspeed_llm.config.experts import ExpertConfig
from mindspeed_llm.config.guards import GuardConfig
from mindspeed_llm.config.inference import InferenceConfig
from mindspeed_llm.config.logging import LoggingConfig
from mindspeed_llm.config.lora import LoraConfig
from mindspeed_llm.config.memory import MemoryConfig
from mindspeed_llm.config.model import ModelConfig
from mindspeed_llm.config.operators import OperatorConfig
from mindspeed_llm.config.parallel import ParallelConfig, RuntimeConfig
from mindspeed_llm.config.profiling import ProfilingConfig
from mindspeed_llm.config.recompute import RecomputeConfig
from mindspeed_llm.config.schema import TRAINING_DOORS, Option, options_of
from mindspeed_llm.config.training import OptimizerConfig, TrainingConfig

MODEL_DOORS = (*TRAINING_DOORS, "inference")
SECTION_DOORS = {
    "data": EVERY_DATA_DOOR,
    "tokenizer": (*EVERY_DATA_DOOR, "inference"),
    "model": MODEL_DOORS,
    "experts": MODEL_DOORS,
    "parallel": MODEL_DOORS,
    "runtime": MODEL_DOORS,
    "operators": MODEL_DOORS,
    "training": TRAINING_DOORS,
    "memory": TRAINING_DOORS,
    "recompute": TRAINING_DOORS,
    "optimizer": TRAINING_DOORS,
    "lora": (*MODEL_DOORS, "convert"),
    "checkpoint": MODEL_DOORS,
    "guards": TRAINING_DOORS,
    "logging": TRAINING_DOORS,
    "profiling": TRAINING_DOORS,
    "convert": ("convert",),
    "inference": ("inference",),
}


@dataclass
class RunConfig:
    """Everything a door was told; `given` maps an option's name to its source ("command line" or the YAML file)."""

    door: str
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    experts: ExpertConfig = field(default_factory=ExpertConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    operators: OperatorConfig = field(default_factory=OperatorConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guards: GuardConfig = field(default_factory=GuardConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    profiling: ProfilingConfig = field(default_factory=ProfilingConfig)
    convert: ConvertConfig = field(default_factory=ConvertConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    given: dict[str, str] = field(default_factory=dict)

    def get(self, name: str) -> Any:
        """Value of the option `name` (unique over all sections)."""
        return getattr(getattr(self, all_options()[name].section), name)

    def set(self, name: str, value: Any, source: str | None = None) -> None:
        """Set the option `name`; with `source`, note who said so."""
        setattr(getattr(self, all_options()[name].section), name, value)
        if source is not None:
            self.given[name] = source

    def of_kind(self, kind: str) -> dict[str, Any]:
        """Values of this door's options of one kind ("identity", "continuity", "free"), by name."""
        return {o.name: self.get(o.name) for o in door_options(self.door) if o.kind == kind}

    def to_json(self) -> dict[str, dict[str, Any]]:
        """All values of this door by section, as YAML and checkpoint records hold them."""
        record: dict[str, dict[str, Any]] = {}
        for o in door_options(self.door):
            record.setdefault(o.section, {})[o.name] = self.get(o.name)
        return record


@cache
def all_options() -> dict[str, Option]:
    """Every option by name."""
    table: dict[str, Option] = {}
    sections = {f.name: f for f in dataclasses.fields(RunConfig)}
    for section, doors in SECTION_DOORS.items():
        for o in options_of(section, sections[section].default_factory, doors):
            assert o.name not in table, f"option {o.name} is declared twice"
            table[o.name] = o
    return table


@cache
def door_options(door: str) -> tuple[Option, ...]:
    """The options one door takes, in declaration order."""
    return tuple(o for o in all_options().values() if door in o.doors)
