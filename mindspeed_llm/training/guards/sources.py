"""From a micro-batch back to the samples in it and to their text."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mindspeed_llm.data.samplers import split_global_batch
from mindspeed_llm.data.tokenizer import Tokenizer, load_tokenizer
from mindspeed_llm.plan.plan import Plan
from mindspeed_llm.training.data import TrainingData

SHOWN_CHARACTERS = 80


@dataclass(frozen=True)
class Sample:
    """One sample of a batch.

    Attributes:
        index: its number in the training part.
        place: file and row.
        text: decoded with the run's tokenizer; the token ids where there is none.
    """

    index: int
    place: str
    text: str

    def __str__(self) -> str:
        text = " ".join(self.text.split())
        shown = text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."
        return f"sample {self.index} ({self.place}: {shown!r})"


class SampleSource:
    """The samples of this run's batches."""

    def __init__(self, plan: Plan, data: TrainingData) -> None:
        self.plan, self.data = plan, data

    def rows(self, consumed_samples: int, data_parallel_rank: int) -> list[list[int]]:
        """Sample numbers of each micro-batch that a data-parallel rank has after `consumed_samples`."""
        return split_global_batch(
            self.data.sample_indices(consumed_samples),
            data_parallel_rank,
            self.plan.data_parallel_size,
            self.plan.config.training.micro_batch_size,
        )

    def alone(self, index: int) -> Any:
        """The micro-batch of one sample."""
        return self.data.collate([self.data.train.dataset.sample(index)])

    def sample(self, index: int) -> Sample:
        """What a message says about a sample."""
        return Sample(index, self.data.describe(index), self._text(index))

    def _text(self, index: int) -> str:
        ids = self.data.train.dataset.sample(index)["input_ids"].tolist()
        return self._tokenizer.decode(ids) if self._tokenizer is not None else f"token ids {ids}"

    @cached_property
    def _tokenizer(self) -> Tokenizer | None:
        if self.plan.tokenizer is None:
            return None
        t = self.plan.config.tokenizer
        return load_tokenizer(
            self.plan.tokenizer, t.tokenizer_type, not t.tokenizer_not_use_fast, trust_remote_code=t.trust_remote_code
        )


def append_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows to a file of json lines, on the disk when this returns."""
    import os

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())


def as_rows(samples: list[Sample], **more: Any) -> list[dict[str, Any]]:
    """Rows for `append_lines`."""
    return [more | asdict(sample) for sample in samples]
