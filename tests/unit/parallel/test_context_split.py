"""A sequence is shared by context-parallel ranks: every token once, every visible pair once, equal work."""

import random

import pytest

from mindspeed_llm.parallel.context_split import SequenceSplit, parts

SPLITS = [SequenceSplit(c, u) for c, u in ((1, 1), (2, 1), (2, 2), (3, 1), (4, 1), (4, 2), (4, 4), (8, 2), (12, 3))]
NAMES = [f"{s.ring} x {s.ulysses}" for s in SPLITS]


def tokens(ranges):
    return [token for start, stop in ranges for token in range(start, stop)]


@pytest.mark.parametrize("split", SPLITS, ids=NAMES)
def test_every_token_lives_on_one_rank_and_places_hold_what_their_ranks_hold(split):
    for times in (1, 3):
        length = times * split.multiple
        held = [tokens(split.ranges(rank, length)) for rank in range(split.ranks)]
        assert sorted(sum(held, [])) == list(range(length))
        assert {len(mine) for mine in held} == {length // split.ranks}
        for place in range(split.ring):
            together = sum(held[place * split.ulysses : (place + 1) * split.ulysses], [])
            assert together == tokens(split.chunks(place, length)) == sorted(together)


def test_a_length_that_does_not_divide_is_an_error():
    with pytest.raises(ValueError, match="a multiple of 8, not 20 tokens"):
        SequenceSplit(4).ranges(0, 20)


def visible(bounds, window):
    """(query, key) pairs, by the definition."""
    document = [number for number, (a, b) in enumerate(zip(bounds, bounds[1:])) for _ in range(a, b)]
    return {
        (q, k)
        for q in range(bounds[-1])
        for k in range(q + 1)
        if document[q] == document[k] and (window is None or k > q - window)
    }


def computed(split, bounds, window):
    """(query, key) pairs that the parts of all places cover, as a list; and how many each place has."""
    pairs, work = [], []
    for place in range(split.ring):
        own = split.chunks(place, bounds[-1])
        before = len(pairs)
        for source in range(split.ring):
            other = split.chunks(source, bounds[-1])
            for part in parts(own, other, bounds, window):
                rows, columns = tokens(own)[part.rows], tokens(other)[part.columns]
                assert rows[0] - columns[0] == part.shift >= 0
                for i, query in enumerate(rows):
                    first = 0 if window is None else max(0, i + part.shift - window + 1)
                    seen = columns[first : i + part.shift + 1]
                    assert seen, "a row of a part sees nothing"
                    pairs += [(query, key) for key in seen]
        work.append(len(pairs) - before)
    return pairs, work


@pytest.mark.parametrize("window", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("split", SPLITS, ids=NAMES)
def test_parts_cover_every_visible_pair_once(split, window):
    draw = random.Random(split.ranks)
    length = 2 * split.multiple
    for documents in (1, 2, 5, length):
        cuts = sorted(draw.choices(range(length + 1), k=documents - 1))
        bounds = (0, *cuts, length)
        pairs, _ = computed(split, bounds, window)
        assert len(pairs) == len(set(pairs))
        assert set(pairs) == visible(bounds, window)


def test_places_have_equal_work_which_a_plain_cut_does_not():
    _, work = computed(SequenceSplit(4), (0, 64), None)
    assert len(set(work)) == 1
    plain = [sum(q + 1 for q in range(place * 16, place * 16 + 16)) for place in range(4)]
    assert sum(plain) == sum(work) and max(plain) > 6 * min(plain)
