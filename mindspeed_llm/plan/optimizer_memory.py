"""Bytes of AdamW's state by where and how it is kept (`memory.optimizer_windows`)."""

from __future__ import annotations

from dataclasses import dataclass

from mindspeed_llm.config.memory import STEP_VALUES, MemoryConfig
from mindspeed_llm.config.training import OptimizerConfig

FP32_BYTES, BF16_BYTES = 4, 2
# Of a master whose weight is its upper half: the lower one, and a bit for ties.
REST_BYTES = 2 + 1 / 8
# While such masters are put together and taken apart: the fp32 values, their weights, and integers of the same size.
JOINING_BYTES = 24


@dataclass(frozen=True)
class OptimizerForm:
    """What of the state is kept how.

    Attributes:
        moment_bytes: of one moment.
        split: bf16 weights are halves of their masters.
        windows: in how many parts the state comes from the host; None keeps it on the device.
    """

    moment_bytes: int = FP32_BYTES
    split: bool = False
    windows: int | None = None

    @classmethod
    def of(cls, optimizer: OptimizerConfig, memory: MemoryConfig) -> OptimizerForm:
        """By the options."""
        return cls(
            BF16_BYTES if optimizer.o2_optimizer else FP32_BYTES,
            memory.reuse_fp32_param,
            memory.swap_optimizer_times if memory.swap_optimizer else None,
        )

    def state_bytes(self, dtype_bytes: int) -> float:
        """Of one parameter, wherever it lies: both moments and, for 16-bit weights, the master."""
        master = 0 if dtype_bytes == FP32_BYTES else REST_BYTES if self.split else FP32_BYTES
        return 2 * self.moment_bytes + master

    def resident(self, parameters: float, dtype_bytes: int) -> int:
        """Bytes on the device at all times."""
        return 0 if self.windows else int(parameters * self.state_bytes(dtype_bytes))

    def on_host(self, parameters: float, dtype_bytes: int) -> int:
        """Bytes in memory of the host."""
        return int(parameters * self.state_bytes(dtype_bytes)) if self.windows else 0

    def in_step(self, parameters: float, dtype_bytes: int) -> int:
        """Bytes on the device during a step alone: two windows (or the only one), and what is made fp32 at once."""
        at_once = min(2, self.windows) / self.windows if self.windows else 0
        windows = at_once * parameters * self.state_bytes(dtype_bytes)
        wide = 2 * FP32_BYTES if self.moment_bytes < FP32_BYTES else 0
        wide += JOINING_BYTES if self.split else 0
        return int(windows + wide * min(parameters / (self.windows or 1), STEP_VALUES))


PLAIN = OptimizerForm()
