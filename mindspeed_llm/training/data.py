"""The data of a run: which samples make the micro-batches of an iteration on this data-parallel rank."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mindspeed_llm.data.collate import MicroBatch, collate_concatenated, collate_padded
from mindspeed_llm.data.pretrain_dataset import PretrainDataset
from mindspeed_llm.data.samplers import GlobalBatchSampler, split_global_batch
from mindspeed_llm.data.sft_dataset import SFTDataset
from mindspeed_llm.errors import UserError
from mindspeed_llm.plan.plan import Plan


@dataclass
class DataPart:
    """The training or the validation part: a data set and the order it is read in."""

    dataset: Any
    sampler: GlobalBatchSampler


class TrainingData:
    """Micro-batches by number of consumed samples; nothing here has state, so a resume is arithmetic.

    Args:
        plan: of a training door whose `--data-path` is preprocessed already.
        prefix: the preprocessed data.
        pad_token_id: fills rows that are rounded up.
    """

    def __init__(self, plan: Plan, prefix: str, pad_token_id: int) -> None:
        self.plan = plan
        self.prefix = prefix
        self.pad_token_id = pad_token_id
        t = plan.config.training
        self.train = None if t.eval_only else self._part("train", shuffle=not t.no_shuffle)
        self.valid = self._part("valid", shuffle=False) if self._has_validation() else None
        dataset = (self.train or self.valid).dataset if self.train or self.valid else None
        if isinstance(dataset, SFTDataset) and dataset.packed and not t.padding_free:
            raise UserError("--no-padding-free: packed rows hold several documents that only joined rows keep apart")

    def _open(self, name: str, shuffle: bool) -> Any:
        c = self.plan.config
        if c.door == "posttrain":
            return SFTDataset(self.prefix, c.data.split, name, foreign=True)
        return PretrainDataset(
            self.prefix, self.plan.seq_length, c.data.split, name, c.data.seed, shuffle, c.training.reset_attention_mask
        )

    def _part(self, name: str, shuffle: bool) -> DataPart:
        dataset = self._open(name, shuffle)
        size, seed = self.plan.global_batch_size, self.plan.config.data.seed
        if isinstance(dataset, SFTDataset):
            return DataPart(dataset, dataset.sampler(size, seed, shuffle))
        return DataPart(dataset, dataset.sampler(size))

    def _has_validation(self) -> bool:
        """Whether the split leaves anything to evaluate on."""
        shares = [float(share) for share in self.plan.config.data.split.split(",")]
        if self.plan.config.training.eval_iters == 0 or len(shares) < 2 or shares[1] == 0:
            return False
        try:
            dataset = self._open("valid", shuffle=False)
        except UserError:
            # A part too small for one sample: evaluation is impossible, which the run says at its start.
            return False
        return not isinstance(dataset, SFTDataset) or len(dataset) > 0

    @property
    def samples_per_epoch(self) -> int:
        """Samples of one pass over the training part."""
        dataset = self.train.dataset
        return len(dataset) if isinstance(dataset, SFTDataset) else dataset.samples_per_epoch

    def fingerprint(self) -> str:
        """Digest of the data files, recorded in checkpoints."""
        return (self.train or self.valid).dataset.fingerprint()

    def sample_indices(self, consumed_samples: int, part: str = "train") -> list[int]:
        """Rows of the global batch after `consumed_samples`."""
        return getattr(self, part).sampler.batch_at(consumed_samples)

    def micro_batches(self, consumed_samples: int, data_parallel_rank: int, part: str = "train") -> list[MicroBatch]:
        """This rank's micro-batches of the global batch after `consumed_samples`."""
        rows = split_global_batch(
            self.sample_indices(consumed_samples, part),
            data_parallel_rank,
            self.plan.data_parallel_size,
            self.plan.config.training.micro_batch_size,
        )
        dataset = getattr(self, part).dataset
        return [self.collate([dataset.sample(i) for i in row]) for row in rows]

    def collate(self, samples: list[dict[str, Any]]) -> MicroBatch:
        """Samples to tensors in the form the options ask for."""
        t = self.plan.config.training
        split = self.plan.layout.sequence_split
        shared = math.lcm(
            split.multiple, split.ranks * (self.plan.tensor_parallel_size if self.plan.sequence_parallel else 1)
        )
        multiple = math.lcm(t.pad_to_multiple_of or 1, shared)
        row_length = -(-self.plan.seq_length // shared) * shared
        if self.plan.config.door == "pretrain":
            if t.reset_attention_mask:
                return collate_concatenated(samples, self.pad_token_id, multiple)
            return collate_padded(samples, self.pad_token_id, row_length)
        longest = max(len(sample["input_ids"]) for sample in samples)
        if longest > self.plan.seq_length:
            raise UserError(
                f"data: a sample of {longest} tokens does not fit --seq-length {self.plan.seq_length}; "
                f"try: --seq-length {longest}, or preprocess with --seq-length {self.plan.seq_length}"
            )
        if t.padding_free:
            return collate_concatenated(samples, self.pad_token_id, multiple)
        if t.pad_to_seq_length:
            return collate_padded(samples, self.pad_token_id, row_length)
        return collate_padded(samples, self.pad_token_id, pad_to_multiple_of=multiple)

    def evaluation_batches(self, iterations: int, data_parallel_rank: int) -> Iterator[list[MicroBatch]]:
        """`iterations` global batches from the start of the validation part, the same at every evaluation."""
        for iteration in range(iterations):
            consumed = iteration * self.plan.global_batch_size
            yield self.micro_batches(consumed, data_parallel_rank, "valid")


def evaluation_iterations(data: TrainingData, asked: int) -> int:
    """Global batches per evaluation: as asked, but a small validation part is not read twice."""
    if data.valid is None:
        return 0
    dataset = data.valid.dataset
    rows = len(dataset) if isinstance(dataset, SFTDataset) else dataset.samples_per_epoch
    return max(min(asked, rows // data.plan.global_batch_size), 1)
