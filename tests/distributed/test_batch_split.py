"""The same rows give the same losses and gradients however they are split, and the comparison notices mistakes."""

from pathlib import Path

import numpy as np
import pytest

from mindspeed_llm.testing.layouts import assert_same, compare, make_rows, train
from mindspeed_llm.testing.mutations import MUTATIONS
from mindspeed_llm.testing.pool import pool

# Rows of 3 to 24 tokens with 1 to 23 trained ones; a micro-batch of the second half of them has none.
ROWS = make_rows(8)
for row in ROWS[3:4]:
    row["labels"] = np.full_like(row["labels"], -100)
SIZES = "--seq-length 128"
JOINED, PADDED = "", "--no-padding-free"
SPLITS = [(1, 1, PADDED), (1, 4, JOINED), (1, 4, PADDED), (2, 1, JOINED), (2, 2, PADDED), (2, 4, JOINED)]


@pytest.fixture(scope="module")
def one_by_one(toy_llama):
    """One process, a row at a time."""
    return pool(1).run(train, str(toy_llama), f"{SIZES} --micro-batch-size 1", ROWS)[0]


@pytest.mark.parametrize("world, micro, how", SPLITS)
def test_batches_of_uneven_rows(one_by_one, toy_llama, world, micro, how):
    found = pool(world).run(train, str(toy_llama), f"{SIZES} --micro-batch-size {micro} {how}", ROWS)
    assert_same(found[0], one_by_one)
    assert all(other.losses == found[0].losses for other in found)
    assert found[0].trained_tokens == [sum(int((row["labels"] >= 0).sum()) for row in ROWS)] * 3


def alone(rows):
    """Each document of packed rows as a row of its own."""
    documents = []
    for row in rows:
        bounds = np.cumsum([0, *row["segment_lengths"]])
        for start, end in zip(bounds, bounds[1:]):
            pieces = {name: row[name][start:end] for name in ("input_ids", "labels")}
            documents.append({**pieces, "segment_lengths": [int(end - start)]})
    return documents


@pytest.mark.parametrize("world, layout", [(1, ""), (2, ""), (2, "--context-parallel-size 2")])
def test_packed_rows_equal_their_documents_alone(toy_llama, world, layout):
    rows = make_rows(4, documents=3)
    assert sum(len(row["input_ids"]) for row in rows) % 4  # a split has to pad
    expected = pool(1).run(train, str(toy_llama), f"{SIZES} --micro-batch-size 1", alone(rows))[0]
    assert_same(pool(world).run(train, str(toy_llama), f"{SIZES} --micro-batch-size 1 {layout}", rows)[0], expected)


LAYOUT_OF = {
    "no sum over sequence shards": "--tensor-model-parallel-size 2 --sequence-parallel",
    "no sum over tied embeddings": "--pipeline-model-parallel-size 2",
    "no sum over data-parallel ranks": "",
    "loss mean per rank": "",
}


def test_every_mutation_is_run_by_a_test():
    texts = [path.read_text() for path in Path(__file__).parent.glob("test_*.py")]
    for mutation in MUTATIONS:
        assert any(f'"{mutation}"' in text for text in texts), mutation


@pytest.mark.parametrize("mutation", LAYOUT_OF)
def test_mistakes_are_noticed(toy_qwen, mutation):
    words = f"{SIZES} --micro-batch-size 1"
    (expected,) = pool(1).run(train, str(toy_qwen), words, ROWS, 1)
    right = pool(2).run(train, str(toy_qwen), f"{words} {LAYOUT_OF[mutation]}", ROWS, 1)[0]
    assert_same(right, expected)
    try:
        wrong = pool(2).run(
            train, str(toy_qwen), f"{words} {LAYOUT_OF[mutation]}", ROWS, 1, "sgd", 0.1, "posttrain", mutation
        )
    except AssertionError as differs:
        assert "differs between ranks" in str(differs)
    else:
        assert compare(wrong[0], expected).gradient > 1e-2
