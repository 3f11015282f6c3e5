"""Divisibility rules: what holds, and legal values that really are legal."""

import dataclasses
import re

import pytest

from mindspeed_llm.models.shape import ModelShape
from mindspeed_llm.parallel.layer_map import LayerMap
from mindspeed_llm.parallel.layout import ParallelLayout
from mindspeed_llm.plan.rules import batch_rules, context_rules, divisors, layout_rules, sequence_rules

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


@pytest.mark.parametrize("cp, ulysses, window, areas", [
    (1, 1, 1, []), (8, 1, 4, []), (8, 2, 2, []), (4, 4, 1, []), (6, 1, 3, []),
    (8, 1, 3, ["context"]), (8, 2, 8, ["context"]), (6, 3, 1, ["context"]), (16, 16, 1, ["context"]),
])  # fmt: skip
def test_context_parallelism(cp, ulysses, window, areas):
    found = context_rules(SHAPE, layout(2, cp=cp, ulysses=ulysses, ring_window=window), attention_dropout=0.0)
    assert [rule.area for rule in found if not rule.ok] == areas


def test_suggested_context_parallelism_is_legal():
    exchange, ring, *_ = context_rules(SHAPE, layout(2, cp=12, ulysses=3, ring_window=3), attention_dropout=0.0)
    assert exchange.legal.startswith("1, 2, 4 ranks") and ring.legal.startswith("1, 2, 4 for --cp-window-size")
    for ulysses, window in ((1, 3), (2, 6), (4, 1)):
        sizes = {"cp": 12, "ulysses": ulysses, "ring_window": window}
        assert broken(context_rules(SHAPE, layout(2, **sizes), attention_dropout=0.0)) == []


def test_dropped_attention_weights_are_refused_under_context_parallelism():
    (rule,) = broken(context_rules(SHAPE, layout(cp=2), attention_dropout=0.1))
    assert rule.problem() == "context: attention_dropout 0.1 = 0 does not hold; legal: --attention-dropout 0"
    assert context_rules(SHAPE, layout(), attention_dropout=0.1) == []


def test_bounded_scores_are_refused_under_context_parallelism():
    capped = dataclasses.replace(SHAPE, attention_softcap=2.0)
    (rule,) = broken(context_rules(capped, layout(cp=2), attention_dropout=0.0))
    assert "--attn-logit-softcapping" in rule.problem() and context_rules(capped, layout(), attention_dropout=0.0) == []
