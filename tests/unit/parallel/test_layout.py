"""Ranks stand where megatron-core puts them."""

import itertools

import pytest

from mindspeed_llm.parallel.layer_map import layer_map
from mindspeed_llm.parallel.layout import ParallelLayout


def groups(layout, varying, fixed):
    """Sets of ranks that differ in one coordinate only."""
    found = {}
    for rank in range(layout.world_size):
        place = layout.coordinates(rank)
        found.setdefault(tuple(getattr(place, name) for name in fixed), []).append((getattr(place, varying), rank))
    return sorted([rank for _, rank in sorted(members)] for members in found.values())


@pytest.mark.parametrize(
    "tp, cp, pp, dp, ep, etp",
    [(1, 1, 1, 1, 1, 1), (2, 1, 2, 2, 2, 2), (2, 2, 2, 1, 2, 2), (2, 1, 1, 4, 4, 1), (2, 2, 1, 2, 4, 2),
     (4, 1, 2, 3, 2, 1)],
)  # fmt: skip
def test_groups_are_those_of_megatron(tp, cp, pp, dp, ep, etp):
    from megatron.core.parallel_state import RankGenerator

    layout = ParallelLayout(layer_map(4, pp), tp * cp * pp * dp, tp, cp, ep, etp)
    dense = RankGenerator(tp=tp, ep=1, dp=dp, pp=pp, cp=cp, order="tp-cp-ep-dp-pp")
    names = ("pp", "dp", "cp", "tp")
    for name in names:
        rest = [other for other in names if other != name]
        assert groups(layout, name, rest) == sorted(dense.get_ranks(name))
    experts = RankGenerator(tp=etp, ep=ep, dp=layout.edp, pp=pp, cp=1, order="tp-cp-ep-dp-pp")
    names = {"pp": "pp", "edp": "dp", "ep": "ep", "etp": "tp"}
    for name, theirs in names.items():
        rest = [other for other in names if other != name]
        assert groups(layout, name, rest) == sorted(experts.get_ranks(theirs))


def test_every_rank_stands_alone():
    layout = ParallelLayout(layer_map(4, 2), 16, tp=2, cp=2)
    places = [layout.coordinates(rank) for rank in range(16)]
    assert len(set(places)) == 16
    assert {(p.pp, p.dp, p.cp, p.tp) for p in places} == set(itertools.product(range(2), repeat=4))
    with pytest.raises(IndexError):
        layout.coordinates(16)
