"""Divisibility rules: what holds, and legal values that really are legal."""

import dataclasses
import re

import pytest

from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.parallel.layer_map import LayerMap
from mindspeed_llm.parallel.layout import ParallelLayout
from mindspeed_llm.plan.rules import batch_rules, divisors, layout_rules, sequence_rules

SHAPE = ModelShape("llama", 12, 96, 160, 8, 4, 16, 997, 256)


def layout(tp=1, pp=1, world=1, **sizes):
    return ParallelLayout(LayerMap(pp, tuple(((stage,),) for stage in range(pp))), world, tp, **sizes)


def broken(rules):
    return [rule for rule in rules if not rule.ok]


def numbers(text):
    return [int(n) for n in re.findall(r"\d+", text)]


def test_divisors():
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert divisors(1) == [1]


@pytest.mark.parametrize("tp, pp, world, areas", [
    (1, 1, 1, []), (2, 1, 2, []), (4, 3, 24, []), (8, 1, 8, ["parallel"]),
    (2, 2, 6, ["launch"]),
    (3, 1, 3, ["parallel", "parallel", "parallel"]),
])  # fmt: skip
def test_layouts(tp, pp, world, areas):
    found = broken(layout_rules(SHAPE, layout(tp, pp, world)))
    assert [rule.area for rule in found] == areas


def test_suggested_layouts_are_legal():
    by_area = {rule.area: rule for rule in layout_rules(SHAPE, layout(7, 7, 5))}
    for tp in numbers(by_area["parallel"].legal):
        assert broken(layout_rules(SHAPE, layout(tp, 1, tp))) == []
    narrow = dataclasses.replace(SHAPE, ffn_hidden_size=162)
    (rule,) = broken(layout_rules(narrow, layout(4, 1, 4)))
    assert numbers(rule.legal) == [1, 2]
    assert rule.problem().startswith("parallel: ffn_hidden_size 162 % tensor parallel 4 = 0 does not hold; legal: 1, 2")


@pytest.mark.parametrize("micro, size, parallel", [(2, 24, 8), (2, 3, 1), (3, 1, 2), (4, 30, 1)])
def test_suggested_batches_are_legal(micro, size, parallel):
    (rule,) = broken(batch_rules(micro, size, parallel))
    nearest = numbers(rule.legal)
    assert nearest and all(broken(batch_rules(micro, n, parallel)) == [] for n in nearest)
    assert broken(batch_rules(micro, micro * parallel * 3, parallel)) == []


def test_sequence_length():
    rules = dict(tp=4, sequence_parallel=True, padded=True)
    assert broken(sequence_rules(SHAPE, seq_length=128, **rules)) == []
    (rule,) = broken(sequence_rules(SHAPE, seq_length=130, **rules))
    assert rule.legal.startswith("128, 132")
    assert broken(sequence_rules(SHAPE, seq_length=130, tp=4, sequence_parallel=True, padded=False)) == []
    (rule,) = broken(sequence_rules(SHAPE, seq_length=257, tp=1, sequence_parallel=False, padded=True))
    assert "max_position_embeddings 256" in rule.says
