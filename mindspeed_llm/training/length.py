"""How long a run is: iterations from iterations, epochs or samples."""

from __future__ import annotations

import math

from mindspeed_llm.config.training import TrainingConfig
from mindspeed_llm.errors import UserError

DEFAULT_EPOCHS = 1.0


def train_iterations(config: TrainingConfig, global_batch_size: int, samples_per_epoch: int) -> int:
    """Optimizer steps of the run.

    Epochs are rounded up to whole global batches; with none of the three given it is one epoch.

    Raises:
        UserError: `--train-samples` is less than one global batch.
    """
    if config.train_iters is not None:
        return config.train_iters
    if config.train_samples is not None:
        if config.train_samples < global_batch_size:
            raise UserError(
                f"--train-samples: {config.train_samples} is less than one global batch of {global_batch_size}; "
                f"legal: {global_batch_size} or more"
            )
        return config.train_samples // global_batch_size
    epochs = config.train_epochs or DEFAULT_EPOCHS
    return math.ceil(epochs * samples_per_epoch / global_batch_size)
