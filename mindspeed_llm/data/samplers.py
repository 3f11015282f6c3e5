"""Which samples form which batch: arithmetic on the number of samples consumed, so that resuming needs no state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from mindspeed_llm.data.splits import EmptyPart
from mindspeed_llm.errors import UserError

PURPOSES = ("documents", "samples")


def permutation(size: int, seed: int, epoch: int, purpose: str = "samples") -> np.ndarray:
    """A permutation of range(size) that depends on (seed, epoch, purpose) alone, never on global random state."""
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch, PURPOSES.index(purpose)])))
    order = generator.permutation(size)
    order.setflags(write=False)
    return order


class LastEpochs:
    """What belongs to an epoch, kept for the two that were made last: around an epoch's end both are read.

    Args:
        make: from the epoch's number; called again if the epoch is asked for later.
    """

    def __init__(self, make: Callable[[int], Any]) -> None:
        self.make = make
        self._kept: dict[int, Any] = {}

    def __call__(self, epoch: int) -> Any:
        """`make(epoch)`."""
        if epoch not in self._kept:
            if len(self._kept) > 1:
                del self._kept[next(iter(self._kept))]
            self._kept[epoch] = self.make(epoch)
        return self._kept[epoch]

    def __getstate__(self) -> dict[str, Any]:
        return {"make": self.make, "_kept": {}}


class GlobalBatchSampler:
    """Endless passes over `num_rows` rows, cut into global batches.

    Args:
        num_rows: rows of the data set; None for a data set that shuffles by itself and takes sample numbers directly.
        global_batch_size: samples per optimizer step.
        seed: of the shuffle.
        shuffle: another order in each epoch; False keeps the file's order.
        complete_last_batch: let each epoch end with a full batch by repeating its first samples (MindSpeed-LLM's
            `--padded-samples`); by default a batch continues into the next epoch.

    Raises:
        EmptyPart: there are no rows.
    """

    def __init__(
        self,
        num_rows: int | None,
        global_batch_size: int,
        seed: int = 1234,
        shuffle: bool = True,
        complete_last_batch: bool = False,
    ) -> None:
        if num_rows == 0:
            raise EmptyPart("data: this split has no rows; try: another --split or more data")
        self.num_rows = num_rows
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.complete_last_batch = complete_last_batch
        self._orders = LastEpochs(partial(permutation, num_rows, seed))

    @property
    def samples_per_epoch(self) -> int | None:
        """Samples consumed by one epoch, None if the data set has no epochs of its own."""
        if self.num_rows is None or not self.complete_last_batch:
            return self.num_rows
        return -(-self.num_rows // self.global_batch_size) * self.global_batch_size

    def index(self, consumed_samples: int) -> int:
        """The row that is consumed after `consumed_samples` others."""
        if self.num_rows is None:
            return consumed_samples
        epoch, position = divmod(consumed_samples, self.samples_per_epoch)
        position %= self.num_rows
        return int(self._orders(epoch)[position]) if self.shuffle else position

    def batch_at(self, consumed_samples: int, global_batch_size: int | None = None) -> list[int]:
        """The rows of the global batch that starts after `consumed_samples`; its size may change during a run."""
        size = self.global_batch_size if global_batch_size is None else global_batch_size
        return [self.index(consumed_samples + offset) for offset in range(size)]

    def indices(self, iteration: int) -> list[int]:
        """The rows of global batch `iteration`, counted from 0, at constant batch size."""
        return self.batch_at(iteration * self.global_batch_size)


def split_global_batch(indices: Sequence[int], dp_rank: int, dp_size: int, micro_batch_size: int) -> list[list[int]]:
    """The micro-batches of one data-parallel rank.

    As in Megatron, ranks take turns micro-batch by micro-batch: step k of rank r holds samples
    [(k * dp_size + r) * micro_batch_size, ... + micro_batch_size).

    Returns:
        One list of `micro_batch_size` indices per accumulation step.

    Raises:
        UserError: the global batch does not divide.
    """
    stride = dp_size * micro_batch_size
    if not indices or len(indices) % stride:
        low = len(indices) // stride * stride
        nearest = ", ".join(str(size) for size in (low, low + stride) if size)
        raise UserError(
            f"global-batch-size: {len(indices)} must be micro-batch {micro_batch_size} x data-parallel {dp_size} x k; "
            f"legal nearby: {nearest}"
        )
    starts = range(dp_rank * micro_batch_size, len(indices), stride)
    return [list(indices[start : start + micro_batch_size]) for start in starts]
