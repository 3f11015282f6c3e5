"""Covering sets: every pair that any legal case has is in one of the chosen, which are far fewer."""

import pytest

from mindspeed_llm.testing.pairs import covering, legal_cases, pairs_of

FACTORS = {
    "layout": ("one", "tp2", "pp2", "cp2"),
    "dropout": ("", "0.1"),
    "memory": ("", "full", "swap"),
    "base": ("dense", "nf4"),
}


def anything(case):
    return True


def no_swap_on_one(case):
    return (case["layout"], case["memory"]) != ("one", "swap")


@pytest.mark.parametrize("legal", [anything, no_swap_on_one])
def test_every_legal_pair_is_there(legal):
    wanted = set().union(*map(pairs_of, legal_cases(FACTORS, legal)))
    chosen = covering(FACTORS, legal)
    assert set().union(*map(pairs_of, chosen)) == wanted
    assert all(map(legal, chosen)) and len(chosen) <= 14  # 12 pairs of layout and memory, 48 cases
    swapped_on_one = ("layout", "one", "memory", "swap")
    assert (swapped_on_one in wanted) == (legal is anything)


def test_no_case_can_be_left_out():
    chosen = covering(FACTORS, anything)
    every = set().union(*map(pairs_of, chosen))
    left = [set().union(*(pairs_of(c) for c in chosen if c is not one)) for one in chosen]
    assert sum(found == every for found in left) <= 1


def test_the_dearer_value_is_taken_where_it_must_be_and_no_oftener():
    def cost(case):
        return 5.0 if case["layout"] == "cp2" else 1.0

    count = [sum(case["layout"] == "cp2" for case in covering(FACTORS, anything, c)) for c in (cost, lambda case: 1.0)]
    assert count[0] == 3 <= count[1]


def test_the_same_set_each_time():
    assert covering(FACTORS, anything) == covering(FACTORS, anything)
