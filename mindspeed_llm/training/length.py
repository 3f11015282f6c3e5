"""How long a run is: iterations from iterations, epochs or samples."""

from __future__ import annotations

import math
from fractions import Fraction

from mindspeed_llm.config.training import TrainingConfig

DEFAULT_EPOCHS = 1.0


def train_iterations(config: TrainingConfig, global_batch_size: int, samples_per_epoch: int) -> int:
    """Optimizer steps of the run.

    Epochs are rounded up to whole global batches, samples down (a plan has at least one of them); with none of the
    three given it is one epoch.
    """
    if config.train_iters is not None:
        return config.train_iters
    if config.train_samples is not None:
        return config.train_samples // global_batch_size
    # As written: 0.07 of 100 samples are 7, and not the little more that its nearest float gives.
    epochs = Fraction(str(config.train_epochs or DEFAULT_EPOCHS))
    return math.ceil(epochs * samples_per_epoch / global_batch_size)
