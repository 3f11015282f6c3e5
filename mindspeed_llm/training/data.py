"""The data of a run: which samples make the micro-batches of an iteration on this data-parallel rank."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from mindspeed_llm.data.blend import BlendedDataset, Member, parse_data_path
from mindspeed_llm.data.collate import MicroBatch, collate_concatenated, collate_padded
from mindspeed_llm.data.pretrain_dataset import PretrainDataset
from mindspeed_llm.data.samplers import GlobalBatchSampler, split_global_batch
from mindspeed_llm.data.sft_dataset import SFTDataset
from mindspeed_llm.data.splits import EmptyPart
from mindspeed_llm.errors import UserError
from mindspeed_llm.plan.continuity import is_allowed
from mindspeed_llm.plan.plan import Plan


@dataclass
class DataPart:
    """The training or the validation part: a data set, or a blend of some, and the order it is read in."""

    dataset: Any
    sampler: GlobalBatchSampler


class TrainingData:
    """Micro-batches by number of consumed samples; nothing here has state, so a resume is arithmetic.

    Args:
        plan: of a training door whose `--data-path` is preprocessed already.
        prefixes: the preprocessed data, one for each set that `--data-path` names.
        pad_token_id: fills rows that are rounded up.
    """

    def __init__(self, plan: Plan, prefixes: Sequence[str], pad_token_id: int) -> None:
        self.plan = plan
        self.prefixes = prefixes
        self.pad_token_id = pad_token_id
        t = plan.config.training
        self.train = None if t.eval_only else self._part("train", shuffle=not t.no_shuffle)
        self.valid = self._validation_part()
        dataset = (self.train or self.valid).dataset if self.train or self.valid else None
        if plan.config.door == "posttrain" and dataset is not None and dataset.packed and not t.padding_free:
            raise UserError(
                "--no-padding-free: packed rows hold several documents that only joined rows keep apart; leave the "
                "flag out"
            )

    def _open(self, prefix: str, name: str, shuffle: bool) -> Any:
        c = self.plan.config
        if c.door == "posttrain":
            return SFTDataset(prefix, c.data.split, name, foreign=True)
        return PretrainDataset(
            prefix, self.plan.seq_length, c.data.split, name, c.data.seed, shuffle, c.training.reset_attention_mask
        )

    def _member(self, prefix: str, name: str, shuffle: bool) -> Member:
        dataset, seed = self._open(prefix, name, shuffle), self.plan.config.data.seed
        rows = dataset.num_rows
        return Member(dataset, GlobalBatchSampler(rows, self.plan.global_batch_size, seed, shuffle))

    def _part(self, name: str, shuffle: bool) -> DataPart:
        """A part of all sets.

        Raises:
            EmptyPart: one of them has no sample for it.
        """
        return self._blend([self._member(prefix, name, shuffle) for prefix in self.prefixes], self._weights())

    def _blend(self, members: Sequence[Member], weights: Sequence[Fraction] | None) -> DataPart:
        if len(members) == 1:
            return DataPart(members[0].dataset, members[0].sampler)
        return DataPart(BlendedDataset(members, weights), GlobalBatchSampler(None, self.plan.global_batch_size))

    def _weights(self) -> list[Fraction] | None:
        """Of the sets in `--data-path`, None where none are given."""
        weights = [source.weight for source in parse_data_path(self.plan.config.data.data_path)]
        return None if None in weights else weights

    def _validation_part(self) -> DataPart | None:
        """The validation parts of those sets that have a sample for it; None when none has."""
        shares = [float(share) for share in self.plan.config.data.split.split(",")]
        if self.plan.config.training.eval_iters == 0 or len(shares) < 2 or shares[1] == 0:
            return None
        weights = self._weights()
        found: list[tuple[Member, Fraction | None]] = []
        for number, prefix in enumerate(self.prefixes):
            with suppress(EmptyPart):
                found.append((self._member(prefix, "valid", shuffle=False), weights[number] if weights else None))
        if not found:
            return None
        return self._blend([member for member, _ in found], [w for _, w in found] if weights else None)

    @property
    def name(self) -> str:
        """The data in messages."""
        return ", ".join(self.prefixes)

    @property
    def samples_per_epoch(self) -> int:
        """Samples of one pass over the training part; of a blend, as many as its sets have together."""
        return self.train.dataset.samples_per_epoch

    def fingerprint(self) -> str:
        """Digest of the data files and of the ratios of a blend, recorded in checkpoints."""
        return (self.train or self.valid).dataset.fingerprint()

    def check_unchanged(self, record: dict[str, Any]) -> None:
        """Refuse to go on with other data files, or another blend of them, than a run began with.

        Args:
            record: of the checkpoint that is resumed.

        Raises:
            UserError: they differ and no `--allow-change data-path` was given.
        """
        if record["data"] == self.fingerprint() or is_allowed(self.plan.config, "data_path"):
            return
        before, now = record["continuity"]["data_path"], self.plan.config.data.data_path
        what = f"was '{' '.join(before)}' and is now '{' '.join(now)}'" if before != now else f"'{' '.join(now)}'"
        raise UserError(
            f"resume: --data-path {what}, because files, weights or their order are not those the run began with; "
            "legal: the same; try: --allow-change data-path if it is meant (consumed samples keep counting)"
        )

    def describe(self, index: int, part: str = "train") -> str:
        """File and row of one of the `sample_indices`, for messages."""
        return getattr(self, part).dataset.describe(index)

    def sample_indices(self, consumed_samples: int, part: str = "train") -> list[int]:
        """Rows (of a blend: sample numbers) of the global batch after `consumed_samples`."""
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
        split, chunks = self.plan.layout.sequence_split, self.plan.config.operators.coc_parallel_num
        cuts = self.plan.tensor_parallel_size * chunks if self.plan.sequence_parallel else 1
        shared = math.lcm(split.multiple, split.ranks * cuts)
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
    return max(min(asked, data.valid.dataset.samples_per_epoch // data.plan.global_batch_size), 1)
