"""Samples to one micro-batch of tensors, padded or concatenated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mindspeed_llm.data.record import IGNORE_INDEX


@dataclass
class MicroBatch:
    """What a model's forward needs.

    Attributes:
        input_ids, labels, position_ids: [b, s] int64; labels are shifted, -100 where there is no loss. Concatenated
            batches have b = 1.
        padding: [b, s] bool, what fills the rows up.
        cu_seqlens: [d + 1] int32, bounds of the d documents in a concatenated row, None for padded batches.
        max_seqlen: tokens of the longest document, None for padded batches.
        num_tokens: tokens without padding.
        num_trained_tokens: positions with a loss.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    padding: torch.Tensor
    cu_seqlens: torch.Tensor | None
    max_seqlen: int | None
    num_tokens: int
    num_trained_tokens: int


def collate_padded(
    samples: Sequence[Mapping[str, Any]], pad_token_id: int, seq_length: int | None = None, pad_to_multiple_of: int = 1
) -> MicroBatch:
    """One sample per row, padded on the right (causal attention then needs no mask).

    Args:
        samples: `input_ids` [n], shifted `labels` [n], optional `segment_lengths`.
        pad_token_id: fills the rest of a row; never trained, whatever id it is.
        seq_length: length of every row; None takes the longest sample.
        pad_to_multiple_of: the longest sample is rounded up to this.

    Raises:
        ValueError: a sample is longer than `seq_length` or holds several documents, which would see each other here.
    """
    lengths = [len(sample["input_ids"]) for sample in samples]
    for sample, length in zip(samples, lengths):
        if len(sample.get("segment_lengths", (length,))) > 1:
            raise ValueError("collate: a sample holds several documents; only a concatenated batch keeps them apart")
    width = -(-max(lengths) // pad_to_multiple_of) * pad_to_multiple_of if seq_length is None else seq_length
    if max(lengths) > width:
        raise ValueError(f"collate: a sample of {max(lengths)} tokens does not fit seq_length {width}")
    input_ids = np.full((len(samples), width), pad_token_id, np.int64)
    labels = np.full((len(samples), width), IGNORE_INDEX, np.int64)
    for row, (sample, length) in enumerate(zip(samples, lengths)):
        input_ids[row, :length] = sample["input_ids"]
        labels[row, :length] = sample["labels"]
    # Padding does not lengthen the sequence, by which some models choose their rotary frequencies.
    positions = np.broadcast_to(np.arange(width, dtype=np.int64).clip(max=max(lengths) - 1), input_ids.shape)
    return _micro_batch(input_ids, labels, positions.copy(), np.array(lengths), None)


def collate_concatenated(
    samples: Sequence[Mapping[str, Any]], pad_token_id: int, pad_to_multiple_of: int = 1, length: int | None = None
) -> MicroBatch:
    """All documents of all samples in one row [1, t], kept apart by cu_seqlens; positions restart in each.

    Args:
        samples: `input_ids` [n], shifted `labels` [n], optional `segment_lengths` (default: one document).
        pad_token_id: fills the tail, which counts as a document of its own and is not trained.
        pad_to_multiple_of: t is rounded up to this (sequence and context parallel shards need it).
        length: t itself, where it must be the same on all ranks and steps.

    Raises:
        ValueError: the documents do not fit `length`, or segment lengths do not sum up.
    """
    documents: list[int] = []
    for sample in samples:
        segments = list(sample.get("segment_lengths", (len(sample["input_ids"]),)))
        if sum(segments) != len(sample["input_ids"]) or min(segments) < 1:
            raise ValueError(f"collate: segments {segments} do not cover a sample of {len(sample['input_ids'])} tokens")
        documents += segments
    num_tokens = sum(documents)
    width = -(-num_tokens // pad_to_multiple_of) * pad_to_multiple_of if length is None else length
    if num_tokens > width:
        raise ValueError(f"collate: {num_tokens} tokens do not fit length {width}")
    tail = width - num_tokens
    pad, ignored = np.full(tail, pad_token_id, np.int64), np.full(tail, IGNORE_INDEX, np.int64)
    input_ids = np.concatenate([*(sample["input_ids"] for sample in samples), pad])[None]
    labels = np.concatenate([*(sample["labels"] for sample in samples), ignored])[None]
    # As in collate_padded: padding is not longer than the longest document.
    padding = np.arange(tail, dtype=np.int64).clip(max=max(documents) - 1)
    positions = np.concatenate([*(np.arange(size, dtype=np.int64) for size in documents), padding])[None]
    documents += [tail] if tail else []
    bounds = np.concatenate([[0], np.cumsum(documents)]).astype(np.int32)
    return _micro_batch(input_ids, labels, positions, np.array([num_tokens]), bounds)


def _micro_batch(
    input_ids: np.ndarray, labels: np.ndarray, positions: np.ndarray, lengths: np.ndarray, bounds: np.ndarray | None
) -> MicroBatch:
    """`lengths` [b]: tokens of each row, the rest being padding."""
    return MicroBatch(
        input_ids=torch.from_numpy(np.ascontiguousarray(input_ids, np.int64)),
        labels=torch.from_numpy(np.ascontiguousarray(labels, np.int64)),
        position_ids=torch.from_numpy(positions),
        padding=torch.from_numpy(np.arange(input_ids.shape[1]) >= lengths[:, None]),
        cu_seqlens=None if bounds is None else torch.from_numpy(bounds),
        max_seqlen=None if bounds is None else int(np.diff(bounds).max()),
        num_tokens=int(lengths.sum()),
        num_trained_tokens=int(np.count_nonzero(labels != IGNORE_INDEX)),
    )
