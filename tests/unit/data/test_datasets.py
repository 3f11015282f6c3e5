"""What training reads: windows of documents, rows of samples, orders that are arithmetic."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest

from mindspeed_llm.data.indexed import IndexedWriter
from mindspeed_llm.data.preprocess import preprocess_input
from mindspeed_llm.data.pretrain_dataset import PretrainDataset
from mindspeed_llm.data.samplers import GlobalBatchSampler, permutation, split_global_batch
from mindspeed_llm.data.sft_dataset import SFTDataset
from mindspeed_llm.data.splits import split_bounds
from mindspeed_llm.errors import UserError

ALL = "1,0,0"


@pytest.fixture(scope="module")
def pretrain_prefix(tmp_path_factory, text_file, tokenizer):
    prefix = str(tmp_path_factory.mktemp("pt") / "d")
    preprocess_input(str(text_file), prefix, tokenizer, handler_name="GeneralPretrainHandler", append_eod=True)
    return prefix


@pytest.fixture(scope="module")
def sft_prefixes(tmp_path_factory, alpaca_file, tokenizer):
    directory = tmp_path_factory.mktemp("sft")
    for mode in ("none", "pack"):
        preprocess_input(
            str(alpaca_file), str(directory / mode), tokenizer, handler_name="AlpacaStyleInstructionHandler",
            prompt_type="llama2", seq_length=256, pack_mode=mode,
        )  # fmt: skip
    return directory


def epoch_documents(dataset, epoch):
    order = np.arange(dataset.start, dataset.stop)
    if dataset.shuffle:
        order = order[permutation(len(order), dataset.seed, epoch, "documents")]
    return [dataset.reader[int(d)] for d in order]


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_is_the_documents_cut_into_windows(pretrain_prefix, shuffle):
    dataset = PretrainDataset(pretrain_prefix, 64, split=ALL, shuffle=shuffle)
    for epoch in (0, 1):
        stream = np.concatenate(epoch_documents(dataset, epoch))
        first = epoch * dataset.samples_per_epoch
        samples = [dataset.sample(first + i) for i in range(dataset.samples_per_epoch)]
        order = permutation(len(samples), dataset.seed, epoch) if shuffle else np.arange(len(samples))
        for sample, window in zip(samples, order):
            assert np.array_equal(sample["input_ids"], stream[window * 64 : window * 64 + 64])
            assert np.array_equal(sample["labels"], stream[window * 64 + 1 : window * 64 + 65])
        assert len(stream) - 1 - len(samples) * 64 < 64  # only an incomplete window is left out


def test_epochs_and_seeds_differ_and_repeat(pretrain_prefix):
    def first(seed, epoch):
        dataset = PretrainDataset(pretrain_prefix, 64, split=ALL, seed=seed)
        return dataset.sample(epoch * dataset.samples_per_epoch)["input_ids"].tolist()

    assert first(1, 0) == first(1, 0)
    assert len({tuple(first(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4


def test_the_global_random_state_has_no_influence(pretrain_prefix):
    dataset = PretrainDataset(pretrain_prefix, 64)
    before = dataset.sample(5)["input_ids"]
    np.random.seed(0)
    np.random.shuffle(np.arange(100))
    assert np.array_equal(PretrainDataset(pretrain_prefix, 64).sample(5)["input_ids"], before)
    assert np.array_equal(pickle.loads(pickle.dumps(dataset)).sample(5)["input_ids"], before)


def test_parts_of_the_split_share_no_document(pretrain_prefix):
    parts = [PretrainDataset(pretrain_prefix, 16, "8,1,1", name) for name in ("train", "valid", "test")]
    bounds = [(part.start, part.stop) for part in parts]
    assert bounds[0][0] == 0 and bounds[0][1] == bounds[1][0] and bounds[1][1] == bounds[2][0]
    assert bounds[2][1] == len(parts[0].reader)


def test_document_boundaries(pretrain_prefix, tokenizer):
    plain = PretrainDataset(pretrain_prefix, 64)
    isolated = PretrainDataset(pretrain_prefix, 64, reset_attention_mask=True)
    eos, seen = tokenizer.eos_token_id, 0
    for index in range(60):
        theirs, ours = plain.sample(index), isolated.sample(index)
        assert np.array_equal(theirs["input_ids"], ours["input_ids"])
        assert sum(ours["segment_lengths"]) == 64
        # Every document ends with eos here, so a segment ends exactly where an eos is read.
        ends = np.cumsum(ours["segment_lengths"]) - 1
        at_eos = np.flatnonzero(ours["input_ids"] == eos)
        assert set(at_eos) <= set(ends) and set(ends) - set(at_eos) <= {63}
        changed = np.flatnonzero(theirs["labels"] != ours["labels"])
        assert np.array_equal(changed, at_eos) and np.all(ours["labels"][at_eos] == -100)
        seen += len(at_eos)
    assert seen > 10  # the case occurs


def test_pretraining_refusals(pretrain_prefix, sft_prefixes, tmp_path):
    with pytest.raises(UserError, match="fewer than the 1000001 of one sample"):
        PretrainDataset(pretrain_prefix, 1_000_000)
    with pytest.raises(UserError, match="was built for fine-tuning"):
        PretrainDataset(sft_prefixes / "none", 64)
    with pytest.raises(UserError, match="does not exist"):
        PretrainDataset(tmp_path / "nothing", 64)
    with pytest.raises(UserError, match="was built for pre-training"):
        SFTDataset(pretrain_prefix)
    with pytest.raises(UserError, match="no record"):
        SFTDataset(tmp_path / "nothing")


def test_every_spelling_of_the_path_is_the_same_data(pretrain_prefix, sft_prefixes):
    expected = PretrainDataset(pretrain_prefix, 64).sample(0)["input_ids"].tolist()
    for suffix in ("_text_document", "_text_document.bin", "_text_document.idx"):
        assert PretrainDataset(pretrain_prefix + suffix, 64).sample(0)["input_ids"].tolist() == expected
    rows = len(SFTDataset(sft_prefixes / "none", ALL))
    assert len(SFTDataset(f"{sft_prefixes / 'none'}_packed_input_ids_document", ALL)) == rows


@pytest.mark.parametrize("mode", ["none", "pack"])
def test_sft_labels_are_shifted_inside_segments_only(sft_prefixes, mode, tokenizer):
    dataset = SFTDataset(sft_prefixes / mode, ALL)
    several = 0
    for index in range(len(dataset)):
        sample = dataset.sample(index)
        row = dataset.start + index
        stored = dataset._labels[row]
        start = 0
        for length in sample["segment_lengths"]:
            stop = start + length
            assert np.array_equal(sample["labels"][start : stop - 1], stored[start + 1 : stop])
            assert sample["labels"][stop - 1] == -100
            start = stop
        assert start == len(sample["input_ids"]) == len(sample["labels"])
        several += len(sample["segment_lengths"]) > 1
    assert (several > 0) == (mode == "pack")
    total = sum(int((dataset.sample(i)["labels"] != -100).sum()) for i in range(len(dataset)))
    assert total == dataset.record.counts["trained_tokens"]


def test_a_flat_shift_would_cross_segments(tmp_path, tokenizer):
    """Negative control: a sample that begins with a trained token; shifting the whole row would train on it."""
    prefix = tmp_path / "d"
    for name, row in (("input_ids", [5, 6, 7, 8]), ("attention_mask", [1, 1, 2, 2]), ("labels", [-100, 6, 7, 8])):
        writer = IndexedWriter(f"{prefix}_packed_{name}_document", np.int32)
        writer.add(np.array(row))
        writer.close()
        writer.publish()
    sample = SFTDataset(prefix, ALL, foreign=True).sample(0)
    assert sample["labels"].tolist() == [6, -100, 8, -100]
    assert sample["labels"].tolist() != [6, 7, 8, -100]
    assert sample["segment_lengths"] == [2, 2]


def write_foreign(prefix, masks):
    for name in ("input_ids", "attention_mask", "labels"):
        writer = IndexedWriter(f"{prefix}_packed_{name}_document", np.int32)
        for mask in masks:
            writer.add(np.array(mask) if name == "attention_mask" else np.arange(len(mask)))
        writer.close()
        writer.publish()


def test_foreign_rows_that_merge_samples_are_refused(tmp_path):
    write_foreign(tmp_path / "merged", [[1] * 8] * 3)
    with pytest.raises(UserError, match="without segment numbers"):
        SFTDataset(tmp_path / "merged", ALL, foreign=True)
    write_foreign(tmp_path / "neat", [[1, 1, 1, 2, 2, 2, 0, 0], [1] * 8])
    write_foreign(tmp_path / "unpacked", [[1] * 8, [1] * 5])
    assert len(SFTDataset(tmp_path / "neat", ALL, foreign=True).sample(0)["input_ids"]) == 6
    assert len(SFTDataset(tmp_path / "unpacked", ALL, foreign=True)) == 2


@pytest.mark.parametrize("mask", [[0, 1, 1, 0], [1, 3, 3, 0], [2, 1, 1, 1], [0, 0, 0, 0]])
def test_segments_out_of_order_are_refused(tmp_path, mask):
    for name, row in (("input_ids", [5, 6, 7, 8]), ("attention_mask", mask), ("labels", [-100, 6, 7, 8])):
        writer = IndexedWriter(tmp_path / f"d_packed_{name}_document", np.int32)
        writer.add(np.array(row))
        writer.close()
        writer.publish()
    with pytest.raises(UserError, match="does not number its segments"):
        SFTDataset(tmp_path / "d", ALL, foreign=True).sample(0)


@pytest.mark.parametrize("complete", [False, True])
def test_every_row_once_per_epoch(complete):
    sampler = GlobalBatchSampler(10, 4, seed=3, complete_last_batch=complete)
    size = sampler.samples_per_epoch
    assert size == (12 if complete else 10)
    epochs = [[sampler.index(e * size + i) for i in range(size)] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch[:10]) == list(range(10))
        assert epoch[10:] == (epoch[:2] if complete else [])
    assert epochs[0] != epochs[1] != epochs[2]


def test_batches_are_the_consumed_sequence():
    sampler = GlobalBatchSampler(10, 4, seed=3)
    flat = [sampler.index(i) for i in range(40)]
    assert [index for i in range(10) for index in sampler.indices(i)] == flat
    # Resuming after 12 samples with another batch size goes on with the same sequence.
    assert sampler.batch_at(12, 6) == flat[12:18]


def test_without_shuffle_the_order_is_the_files():
    sampler = GlobalBatchSampler(5, 2, shuffle=False)
    assert [sampler.index(i) for i in range(7)] == [0, 1, 2, 3, 4, 0, 1]


def test_data_parallel_ranks_partition_the_batch():
    indices = list(range(100, 124))
    parts = [split_global_batch(indices, rank, 3, 2) for rank in range(3)]
    assert sorted(i for part in parts for micro in part for i in micro) == indices
    assert parts[1] == [[102, 103], [108, 109], [114, 115], [120, 121]]
    with pytest.raises(UserError, match="24 must be micro-batch 5 x data-parallel 2 x k; legal nearby: 20, 30"):
        split_global_batch(indices, 0, 2, 5)


def test_split_bounds_cover_everything_once():
    for split in ("949,50,1", "1", "8,1,1", "0,1,1", "98,2"):
        for total in (0, 1, 7, 1000, 12345):
            bounds = [split_bounds(split, total, name) for name in ("train", "valid", "test")]
            assert bounds[0][0] == 0 and bounds[2][1] == total
            assert bounds[0][1] == bounds[1][0] and bounds[1][1] == bounds[2][0]
    assert split_bounds("949,50,1", 1000, "valid") == (949, 999)
    for wrong in ("", "a,b", "0,0", "1,1,1,1", "-1,2"):
        with pytest.raises(UserError, match="split:"):
            split_bounds(wrong, 10, "train")


def test_fingerprints_follow_the_data(pretrain_prefix, sft_prefixes, tmp_path, tokenizer):
    prints = {
        PretrainDataset(pretrain_prefix, 64).fingerprint(),
        SFTDataset(sft_prefixes / "none").fingerprint(),
        SFTDataset(sft_prefixes / "pack").fingerprint(),
    }
    assert len(prints) == 3
    source = tmp_path / "x.jsonl"
    source.write_text(json.dumps({"text": "abc"}))
    preprocess_input(str(source), str(tmp_path / "d"), tokenizer, handler_name="GeneralPretrainHandler")
    assert PretrainDataset(tmp_path / "d", 1, ALL).fingerprint() not in prints
