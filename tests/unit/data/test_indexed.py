"""Indexed files are Megatron's, byte for byte in layout, and never lose a value."""

from __future__ import annotations

import numpy as np
import pytest

from mindspeed_llm.data.indexed import IndexedReader, IndexedWriter, bin_path, fingerprint, idx_path, merge, token_dtype
from mindspeed_llm.errors import UserError


def write(prefix, sequences, dtype=np.int32):
    writer = IndexedWriter(prefix, dtype)
    for sequence in sequences:
        writer.add(np.array(sequence, dtype=np.int64))
    writer.close()
    writer.publish()


SEQUENCES = [[1, 2, 3], [4], [5, -100, 7, 8], [9, 10]]


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16])
def test_megatron_reads_what_we_write(tmp_path, dtype):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    sequences = [[abs(v) for v in s] for s in SEQUENCES] if dtype is np.uint16 else SEQUENCES
    write(tmp_path / "d", sequences, dtype)
    theirs = IndexedDataset(str(tmp_path / "d"))
    assert [theirs[i].tolist() for i in range(len(theirs))] == sequences
    assert theirs.document_indices.tolist() == [0, 1, 2, 3, 4]
    assert theirs[0].dtype == dtype


def test_bytes_equal_megatrons_writer(tmp_path):
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int32)
    for sequence in SEQUENCES:
        builder.add_document(torch.tensor(sequence), [len(sequence)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    write(tmp_path / "ours", SEQUENCES)
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()


def test_round_trip_and_slices(tmp_path):
    write(tmp_path / "d", SEQUENCES)
    reader = IndexedReader(tmp_path / "d")
    assert [reader[i].tolist() for i in range(len(reader))] == SEQUENCES
    assert reader.slice(2, 1, 3).tolist() == [-100, 7]
    assert reader.num_tokens == 10


def test_a_value_that_does_not_fit_is_refused(tmp_path):
    writer = IndexedWriter(tmp_path / "d", np.uint16)
    with pytest.raises(ValueError, match="do not fit"):
        writer.add(np.array([1, -100]))
    writer.discard()
    assert list(tmp_path.iterdir()) == []


def test_token_dtype_is_megatrons():
    from megatron.core.datasets.indexed_dataset import DType

    for vocab in (100, 65499, 65500, 200000):
        assert token_dtype(vocab) == np.dtype(DType.optimal_dtype(vocab))


def test_nothing_appears_under_the_final_name_before_publish(tmp_path):
    writer = IndexedWriter(tmp_path / "d", np.int32)
    writer.add(np.array([1, 2]))
    writer.close()
    assert not bin_path(tmp_path / "d").exists() and not idx_path(tmp_path / "d").exists()
    writer.publish()
    assert IndexedReader(tmp_path / "d")[0].tolist() == [1, 2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.bin", "d.idx"]


def test_a_truncated_pair_is_refused(tmp_path):
    write(tmp_path / "d", SEQUENCES)
    data = bin_path(tmp_path / "d").read_bytes()
    bin_path(tmp_path / "d").write_bytes(data[:-4])
    with pytest.raises(UserError, match="36 bytes.*legal: 40 bytes"):
        IndexedReader(tmp_path / "d")
    idx_path(tmp_path / "d").write_bytes(idx_path(tmp_path / "d").read_bytes()[:40])
    with pytest.raises(UserError, match="cut short"):
        IndexedReader(tmp_path / "d")


def test_merge_keeps_order_and_document_bounds(tmp_path):
    write(tmp_path / "a", SEQUENCES[:2])
    write(tmp_path / "b", SEQUENCES[2:])
    assert merge([tmp_path / "a", tmp_path / "b"], tmp_path / "m") == 4
    write(tmp_path / "whole", SEQUENCES)
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"m.{suffix}").read_bytes() == (tmp_path / f"whole.{suffix}").read_bytes()


def test_merge_refuses_another_dtype(tmp_path):
    write(tmp_path / "a", [[1]], np.uint16)
    write(tmp_path / "b", [[1]], np.int32)
    with pytest.raises(UserError, match="stores int32"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "m")
    assert not bin_path(tmp_path / "m").exists()


def test_fingerprint_changes_with_one_token(tmp_path):
    write(tmp_path / "a", SEQUENCES)
    before = fingerprint([tmp_path / "a"])
    assert fingerprint([tmp_path / "a"]) == before
    write(tmp_path / "a", [[1, 2, 4], *SEQUENCES[1:]])
    assert fingerprint([tmp_path / "a"]) != before
