"""Micro-batches lose no token, invent none, and keep documents apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mindspeed_llm.data.collate import collate_concatenated, collate_padded

torch.set_num_threads(1)


def sample(*segments):
    """Input ids count up; every position but the last of a segment is trained."""
    ids = np.arange(1, sum(segments) + 1)
    labels = np.append(ids[1:], -100)
    labels[np.cumsum(segments) - 1] = -100
    return {"input_ids": ids, "labels": labels, "segment_lengths": list(segments)}


def test_padded():
    batch = collate_padded([sample(3), sample(5)], pad_token_id=0, pad_to_multiple_of=4)
    assert batch.input_ids.tolist() == [[1, 2, 3, 0, 0, 0, 0, 0], [1, 2, 3, 4, 5, 0, 0, 0]]
    assert batch.labels.tolist() == [[2, 3] + [-100] * 6, [2, 3, 4, 5] + [-100] * 4]
    # Padding does not lengthen a row, which decides on rotary frequencies in some models.
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 4, 4, 4]] * 2
    assert (batch.num_tokens, batch.num_trained_tokens, batch.cu_seqlens) == (8, 6, None)
    assert collate_padded([sample(3)], 0, seq_length=16).input_ids.shape == (1, 16)


def test_padding_with_a_trained_id_changes_no_label():
    """pad == eos: the sample's own eos (5) stays trained although padding has the same id."""
    batch = collate_padded([sample(5)], pad_token_id=5, seq_length=8)
    assert batch.labels[0].tolist() == [2, 3, 4, 5, -100, -100, -100, -100]


def test_padded_refuses_what_it_cannot_keep():
    with pytest.raises(ValueError, match="several documents"):
        collate_padded([sample(2, 2)], 0)
    with pytest.raises(ValueError, match="does not fit seq_length 4"):
        collate_padded([sample(5)], 0, seq_length=4)


def test_concatenated():
    batch = collate_concatenated([sample(2, 3), sample(4)], pad_token_id=0, pad_to_multiple_of=8)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 1, 2, 3, 4] + [0] * 7]
    assert batch.labels.tolist() == [[2, -100, 4, 5, -100, 2, 3, 4, -100] + [-100] * 7]
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3, 3, 3, 3]]
    assert batch.cu_seqlens.tolist() == [0, 2, 5, 9, 16] and batch.cu_seqlens.dtype == torch.int32
    assert (batch.max_seqlen, batch.num_tokens, batch.num_trained_tokens) == (7, 9, 6)


def test_concatenated_to_a_fixed_length():
    batch = collate_concatenated([sample(3)], 0, length=5)
    assert batch.input_ids.shape == (1, 5) and batch.cu_seqlens.tolist() == [0, 3, 5]
    assert collate_concatenated([sample(5)], 0, length=5).cu_seqlens.tolist() == [0, 5]
    with pytest.raises(ValueError, match="do not fit length 5"):
        collate_concatenated([sample(3), sample(3)], 0, length=5)


def test_a_sample_without_segments_is_one_document():
    plain = {"input_ids": np.arange(4), "labels": np.arange(4)}
    assert collate_concatenated([plain, plain], 0).cu_seqlens.tolist() == [0, 4, 8]


@pytest.mark.parametrize("segments", [[2, 1], [5, -1], [4, 0]])
def test_segments_that_do_not_cover_the_sample_are_refused(segments):
    wrong = {**sample(4), "segment_lengths": segments}
    with pytest.raises(ValueError, match="do not cover"):
        collate_concatenated([wrong], 0)


def test_both_forms_train_the_same_pairs():
    samples = [sample(3), sample(6), sample(1)]

    def pairs(batch):
        kept = batch.labels != -100
        return sorted(
            zip(batch.input_ids[kept].tolist(), batch.labels[kept].tolist(), batch.position_ids[kept].tolist())
        )

    padded, joined = collate_padded(samples, 0), collate_concatenated(samples, 0, 16)
    assert pairs(padded) == pairs(joined)
    assert padded.num_tokens == joined.num_tokens == 10
    assert padded.num_trained_tokens == joined.num_trained_tokens == 7


def test_arrays_of_a_memory_map_are_not_shared():
    source = sample(4)
    batch = collate_concatenated([source], 0)
    batch.input_ids[0, 0] = 99
    assert source["input_ids"][0] == 1
