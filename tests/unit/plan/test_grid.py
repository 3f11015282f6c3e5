"""The picture of the ranks: every rank is where the layout says, and large worlds are folded."""

import dataclasses
import io
from pathlib import Path

import pytest

from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.parallel.layer_map import layer_map
from mindspeed_llm.parallel.layout import ParallelLayout
from mindspeed_llm.plan.grid import (
    GAP,
    expert_rank_at,
    expert_rows,
    fold,
    grid_rows,
    grid_tables,
    ranges,
    rank_at,
    stage_text,
)
from mindspeed_llm.plan.rules import layout_rules

SHAPE = ModelShape("llama", 8, 48, 80, 6, 2, 12, 131, 256)
MOE = dataclasses.replace(SHAPE, num_moe_experts=8, moe_ffn_hidden_size=32)


def layout(world=16, pp=2, vpp=None, layers=8, **sizes):
    return ParallelLayout(layer_map(layers, pp, vpp), world, **{"tp": 2, "cp": 2, **sizes})


def test_ranks_stand_where_their_coordinates_say():
    made = layout(64, ep=4, etp=1)
    for rank in range(64):
        here = made.coordinates(rank)
        assert rank_at(made, here.pp, here.dp, here.cp, here.tp) == rank
        assert expert_rank_at(made, here.pp, here.edp, here.ep, here.etp) == rank


def test_the_grid_shows_stages_replicas_and_layers():
    header, first, last = grid_rows(layout())
    assert header == ["stage", "layers", "data 0 context 0", "data 0 context 1", "data 1 context 0", "data 1 context 1"]
    assert first == ["0", "embedding, 0-3", "0-1", "2-3", "4-5", "6-7"]
    assert last == ["1", "4-7, head", "8-9", "10-11", "12-13", "14-15"]


def test_chunks_noops_and_prediction_layers_are_shown():
    assert stage_text(layout(vpp=2), 0) == "embedding, 0-1 | 4-5"
    noop = ParallelLayout(layer_map(7, 2, noop_layers=[7]), 4)
    assert stage_text(noop, 1) == "4-6, 1 no-op, head"
    assert stage_text(layout(), 1, dataclasses.replace(SHAPE, mtp_num_layers=1)) == "4-7, 1 multi-token, head"


def test_experts_are_shown_by_their_own_groups():
    rows = expert_rows(layout(16, pp=2, ep=2, etp=1), MOE)
    assert rows[0] == ["stage", "experts", "replica 0", "replica 1", "replica 2", "replica 3"]
    assert rows[1] == ["0", "0-3", "0", "2", "4", "6"]
    assert rows[2] == ["0", "4-7", "1", "3", "5", "7"]
    assert rows[4] == ["1", "4-7", "9", "11", "13", "15"]


def test_large_worlds_are_folded():
    assert fold(3, 6) == [0, 1, 2]
    assert fold(100, 6) == [0, 1, 2, 3, None, 99]
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    rows = grid_rows(layout(16384, pp=32, layers=64))
    assert len(rows) == 1 + 12 and all(len(row) == 8 for row in rows)
    assert rows[1][-2:] == [GAP, "510-511"] and rows[-1][0] == "31" and rows[-1][-1] == "16382-16383"
    assert rows[-2] == [GAP] * 8


def test_the_documentation_shows_what_is_drawn():
    from rich.console import Console

    out = io.StringIO()
    console = Console(file=out, width=110)
    for table in grid_tables(layout(vpp=2, ep=4, etp=1), MOE):
        console.print(table)
    drawn = "\n".join(line.rstrip() for line in out.getvalue().rstrip().split("\n"))
    assert drawn in (Path(__file__).parents[3] / "docs/parallelism.md").read_text()


def test_tables_fit_a_terminal():
    from rich.console import Console

    for made in (layout(), layout(16384, pp=32, layers=64, ep=8, etp=1)):
        out = io.StringIO()
        console = Console(file=out, width=118)
        for table in grid_tables(made, MOE):
            console.print(table)
        assert "16384 = pipeline 32" in out.getvalue() or "16 = pipeline 2" in out.getvalue()
        assert max(map(len, out.getvalue().splitlines())) <= 118


@pytest.mark.parametrize("sizes, area, legal", [
    (dict(ep=3), "experts", "1, 2, 4, 8 for --expert-model-parallel-size"),
    (dict(ep=16), "experts", "1, 2, 4, 8 for"),
    (dict(ep=2, etp=5), "experts", "1, 2 for --expert-tensor-parallel-size"),
])  # fmt: skip
def test_expert_layouts_that_do_not_divide_are_named_with_legal_values(sizes, area, legal):
    broken = [rule for rule in layout_rules(MOE, layout(32, **{"etp": 1, **sizes})) if not rule.ok]
    assert broken and {rule.area for rule in broken} == {area}
    assert any(rule.legal.startswith(legal) for rule in broken)


def test_suggested_expert_layouts_are_legal():
    rule = next(rule for rule in layout_rules(MOE, layout(32, ep=3, etp=1)) if not rule.ok)
    for ep in (1, 2, 4, 8):
        assert str(ep) in rule.legal
        assert all(r.ok for r in layout_rules(MOE, layout(32, ep=ep, etp=1)))


def test_experts_of_a_dense_model_are_refused():
    (rule,) = [rule for rule in layout_rules(SHAPE, layout(ep=2)) if not rule.ok]
    assert "the model has experts for expert parallel 2 x expert tensor parallel 2 does not hold" in rule.problem()


def test_stages_name_legal_numbers_of_stages_and_chunks():
    (rule,) = [rule for rule in layout_rules(SHAPE, layout(vpp=2)) if rule.area == "pipeline"]
    assert rule.ok and "8 layers are shared by 2 stages x 2 chunks" in rule.says
    assert "1, 2, 4, 8 for --pipeline" in rule.legal and "1, 2, 4 chunks per stage" in rule.legal
