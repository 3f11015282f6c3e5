"""Blends: exact shares at every sample, any sample without the ones before it, and refusals."""

import pickle
import random
from fractions import Fraction

import numpy as np
import pytest

from mindspeed_llm.data.blend import BlendedDataset, Member, Shares, WeightedPath, parse_data_path
from mindspeed_llm.data.indexed import IndexedWriter
from mindspeed_llm.data.pretrain_dataset import PretrainDataset
from mindspeed_llm.data.samplers import GlobalBatchSampler
from mindspeed_llm.errors import UserError

THIRDS = [Fraction("0.3"), Fraction("0.7")]


def worst_error(turns, weights):
    """The largest distance of a set from its exact share after any number of samples."""
    counts, error = [0] * len(weights), 0.0
    for done, number in enumerate(turns, start=1):
        counts[number] += 1
        error = max(error, *(abs(c - w * done / sum(weights)) for c, w in zip(counts, weights)))
    return error


def random_weights(seed, most):
    generator = random.Random(seed)
    return [int(10 ** generator.uniform(0, 4)) for _ in range(generator.randint(2, most))]


@pytest.mark.parametrize("seed", range(20))
def test_every_share_is_kept_at_every_sample(seed):
    for most, bound in ((3, 1.0), (20, 2.0)):
        weights = random_weights(seed, most)
        assert worst_error((Shares(weights).at(k)[0] for k in range(400)), weights) <= bound, weights


def test_drawing_lots_would_not_keep_the_shares():
    generator = random.Random(0)
    assert worst_error((int(generator.random() < 0.7) for _ in range(400)), [3, 7]) > 2


def test_a_sample_needs_none_of_those_before_it():
    shares = Shares(random_weights(3, 8))
    seen = [0] * len(shares)
    for k in range(3000):
        assert shares.counts(k) == seen
        number, position = shares.at(k)
        assert position == seen[number]
        seen[number] += 1
    # A billion samples later: still exact, at once, and the set's samples go on one by one.
    far = 10**9 + 7
    number, position = shares.at(far)
    assert position == shares.counts(far)[number]
    assert sum(shares.counts(far)) == far
    exact = [Fraction(far * w, sum(shares.weights)) for w in shares.weights]
    assert max(abs(c - e) for c, e in zip(shares.counts(far), exact)) < 2


def test_only_ratios_count():
    assert Shares([30, 70]).weights == Shares(THIRDS).weights == [3, 7]
    assert [Shares(THIRDS).at(k)[0] for k in range(10)].count(0) == 3
    assert Shares([Fraction(1, 3), Fraction(1, 2)]).weights == [2, 3]


@pytest.mark.parametrize(
    "words, expected",
    [
        ("A", [("A", None)]),
        ("A B", [("A", None), ("B", None)]),
        ("A B C", [("A", None), ("B", None), ("C", None)]),
        ("0.3 A 0.7 B", [("A", Fraction(3, 10)), ("B", Fraction(7, 10))]),
        ("1 A", [("A", Fraction(1))]),
        ("30 A 1e2 ./7", [("A", Fraction(30)), ("./7", Fraction(100))]),
    ],
)
def test_data_paths_are_read_as_megatron_reads_them(words, expected):
    assert parse_data_path(words.split()) == [WeightedPath(*pair) for pair in expected]


@pytest.mark.parametrize(
    "words, why",
    [
        ("0.3 A B", "every data set needs a weight"),
        ("0.3 A 0.7", "every data set needs a weight"),
        ("A 0.3 B 0.7", "every data set needs a weight"),
        ("0.3 A B C", "every data set needs a weight"),
        ("0.3 0.7 A B", "every data set needs a weight"),
        ("0 A 1 B", "weight 0 is wrong"),
        ("-1 A 1 B", "weight -1 is wrong"),
    ],
)
def test_unclear_weights_are_refused(words, why):
    with pytest.raises(UserError, match=f"--data-path: .*{why}.*legal: .*try: "):
        parse_data_path(words.split())


@pytest.fixture
def sets(tmp_path):
    """Three pre-training sets of 6, 11 and 30 samples; a token says which set it is from."""
    made = []
    for number, samples in enumerate((6, 11, 30)):
        writer = IndexedWriter(tmp_path / f"set{number}", np.int32)
        for document in range(samples):
            writer.add(np.arange(8) + 1000 * number + 8 * document)
        writer.add(np.zeros(1, np.int32))
        writer.close()
        writer.publish()
        made.append(PretrainDataset(tmp_path / f"set{number}", 8, split="1"))
    return made


def blend(datasets, weights=None):
    return BlendedDataset([Member(d, GlobalBatchSampler(d.num_rows, 4)) for d in datasets], weights)


def test_unweighted_sets_are_each_read_once_in_an_epoch(sets):
    mixed = blend(sets)
    assert mixed.samples_per_epoch == sum(d.samples_per_epoch for d in sets) == 47
    for epoch in range(2):
        found = [tuple(mixed.sample(epoch * 47 + k)["input_ids"]) for k in range(47)]
        apart = [
            tuple(d.sample(epoch * d.samples_per_epoch + k)["input_ids"])
            for d in sets
            for k in range(d.samples_per_epoch)
        ]
        assert sorted(found) == sorted(apart) and found != apart


def test_each_set_keeps_its_own_order_and_epochs(sets):
    """A small set with a large weight is read again, in a new order, while a large one is not through yet."""
    mixed = blend([sets[0], sets[2]], THIRDS[::-1])
    mine = [k for k in range(30) if mixed.locate(k)[0].dataset is sets[0]]
    found = [mixed.sample(k)["input_ids"].tolist() for k in mine]
    assert found == [sets[0].sample(k)["input_ids"].tolist() for k in range(21)]
    assert found[:6] != found[6:12]


def test_a_blend_survives_being_sent_to_another_process(sets):
    mixed = blend(sets, [Fraction(1)] * 3)
    mixed.sample(3)
    again = pickle.loads(pickle.dumps(mixed))
    assert np.array_equal(again.sample(77)["input_ids"], mixed.sample(77)["input_ids"])


def test_the_fingerprint_knows_files_order_and_ratios(sets):
    prints = [
        blend(sets).fingerprint(),
        blend(sets[:2]).fingerprint(),
        blend(sets[:2], THIRDS).fingerprint(),
        blend(sets[:2], THIRDS[::-1]).fingerprint(),
        blend(sets[1::-1], THIRDS).fingerprint(),
        sets[0].fingerprint(),
    ]
    assert len(set(prints)) == len(prints)
    assert blend(sets[:2], [Fraction(30), Fraction(70)]).fingerprint() == prints[2]


def test_messages_name_the_file(sets):
    names = {blend(sets).describe(k).rsplit("/", 1)[1] for k in range(47)}
    assert names == {"set0", "set1", "set2"}
