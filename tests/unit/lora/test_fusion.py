"""The graph that chooses chunks, and the fused function where nothing is sent."""

import pytest
import torch
from torch import nn

from mindspeed_llm.lora.function import FrozenLinearWithAdapter, LinearKind, adapted_linear
from mindspeed_llm.lora.fusion.cost import (
    CHUNKS,
    FORMS,
    Link,
    Pass,
    Rates,
    Schedule,
    Task,
    busy,
    choose,
    critical_path,
    exposed,
    finish_times,
    fused_tasks,
    seconds,
)
from mindspeed_llm.lora.fusion.products import cut

ROWS, INNER, OUTER = 1024, 512, 512


def rates(bandwidth=1e9, latency=1e-5, launch=1e-6, **handling):
    link = Link(latency, bandwidth, **handling)
    return Rates(1e11, launch, link, link, link)


def size(form, rows=ROWS, world=2):
    return Pass(form, rows, INNER, OUTER, 16, world, 2)


def test_resources_take_their_tasks_in_order_and_wait_for_what_they_need():
    tasks = [
        Task("a", "link", 2.0),
        Task("b", "compute", 1.0),
        Task("c", "compute", 1.0, ("a",)),
        Task("d", "link", 5.0),
    ]
    assert finish_times(tasks) == {"a": 2.0, "b": 1.0, "c": 3.0, "d": 7.0}
    assert [task.name for task in critical_path(tasks)] == ["a", "d"]
    assert busy(tasks, "compute") == 2.0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("handling", [{}, dict(handling=1e-4, handling_per_byte=1e-10)], ids=["free", "handled"])
def test_no_schedule_beats_its_busier_resource_or_loses_to_one_after_the_other(form, chunks, merge, handling):
    tasks = fused_tasks(size(form), rates(**handling), Schedule(chunks, merge))
    time, work = seconds(tasks), [busy(tasks, resource) for resource in ("compute", "link")]
    assert max(work) - 1e-12 <= time <= sum(work) + 1e-12
    assert sum(task.seconds for task in critical_path(tasks)) == pytest.approx(time)


@pytest.mark.parametrize("form", ["gather", "scatter"])
def test_in_many_chunks_the_shorter_of_equal_parts_disappears(form):
    # t = 2, communication = computation = C: C + C / (2 c), as docs/lora-fusion.md derives
    work = 2.0 * ROWS * INNER * OUTER
    balanced = Rates(work, 0.0, *[Link(0.0, ROWS * 512 * 2)] * 3)
    for chunks in CHUNKS:
        one = Pass(form, ROWS, INNER, OUTER, 0, 2, 2)
        assert seconds(fused_tasks(one, balanced, Schedule(chunks))) == pytest.approx(1 + 1 / (2 * chunks))
    reduced = Pass("reduce", ROWS, INNER, OUTER, 0, 2, 2)
    assert seconds(fused_tasks(reduced, balanced, Schedule(4))) == pytest.approx(1 + 1 / 4)


@pytest.mark.parametrize("form", FORMS)
def test_latency_chooses_one_message_and_bandwidth_several(form):
    assert choose(size(form, rows=64), rates(latency=1e-3)) == Schedule(1, merge=True)
    assert choose(size(form, rows=1 << 16), rates(bandwidth=2e8, latency=1e-7)).chunks > 1


@pytest.mark.parametrize("form", FORMS)
def test_what_sending_takes_from_the_processor_is_no_product_and_favours_few_messages(form):
    many = dict(bandwidth=2e8, latency=1e-7)
    schedule = choose(size(form, rows=1 << 14), rates(**many))
    free, handled = (fused_tasks(size(form, rows=1 << 14), rates(**many, handling=h), schedule) for h in (0.0, 1e-3))
    sent = sum(task.resource == "link" for task in handled)
    assert busy(handled, "compute") == pytest.approx(busy(free, "compute") + sent * 1e-3)
    assert exposed(handled) >= exposed(free) and exposed(free) == seconds(free) - busy(free, "compute")
    assert choose(size(form, rows=1 << 14), rates(**many, handling=1.0)) == Schedule(1, merge=True)
    assert schedule.chunks > 1


def test_rows_are_cut_into_parts_that_follow_each_other():
    for rows in (0, 1, 7, 8):
        for chunks in CHUNKS:
            parts = cut(rows, chunks)
            assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]
            assert (parts[0].start, parts[-1].stop) == (0, rows)
            assert len(parts) <= max(rows, 1)


class Halves:
    """A frozen weight that is kept as two halves."""

    def __init__(self, weight):
        self.halves, self.made = weight.chunk(2), 0

    def materialize(self):
        self.made += 1
        return torch.cat(self.halves)


def problem(dtype=torch.float64):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(5, 2, 12), torch.randn(8, 12), torch.randn(8)
    a, b, dy = torch.randn(3, 12), torch.randn(8, 3), torch.randn(5, 2, 8)
    x, weight, bias, a, b, dy = (tensor.to(dtype) for tensor in (x, weight, bias, a, b, dy))
    return x.requires_grad_(), weight, bias, a.requires_grad_(), b.requires_grad_(), dy


def plain(x, weight, bias, a, b, scaling=2.0):
    return nn.functional.linear(x, weight, bias) + scaling * (x @ a.t()) @ b.t()


def gradients(out, dy, *leaves):
    return torch.autograd.grad(out, leaves, dy)


@pytest.mark.parametrize("combine", [False, True])
@pytest.mark.parametrize("wraps", [False, True])
def test_one_rank_computes_the_formula(combine, wraps):
    x, weight, bias, a, b, dy = problem()
    kind = LinearKind(True, False, None, 1, 2.0, combine=combine)
    frozen = Halves(weight) if wraps else weight
    out = FrozenLinearWithAdapter.apply(x, None, frozen, bias, a, b, kind)
    expected = plain(x, weight, bias, a, b)
    torch.testing.assert_close(out, expected)
    for found, wanted in zip(gradients(out, dy, x, a, b), gradients(expected, dy, x, a, b)):
        torch.testing.assert_close(found, wanted)
    if wraps:
        assert frozen.made == 2
    assert not torch.allclose(out, plain(x, weight, bias, a, b, scaling=1.0))


@pytest.mark.parametrize("dropout", [False, True])
def test_torch_s_own_functions_give_the_same(dropout):
    x, weight, bias, a, b, dy = problem()
    keep = (torch.rand_like(x) > 0.3) / 0.7
    outs = [
        run(x, x * keep if dropout else None, weight, bias, a, b, LinearKind(True, False, None, 1, 2.0))
        for run in (FrozenLinearWithAdapter.apply, adapted_linear)
    ]
    torch.testing.assert_close(*outs)
    for found, expected in zip(*(gradients(out, dy, x, a, b) for out in outs)):
        torch.testing.assert_close(found, expected)


def test_a_weight_that_is_an_object_is_all_that_waits_for_the_backward_pass():
    x, weight, bias, a, b, _ = problem()
    saved = []
    kind = LinearKind(True, False, None, 1, 2.0)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        FrozenLinearWithAdapter.apply(x, None, Halves(weight), bias, a, b, kind)
        assert weight.shape not in saved
        FrozenLinearWithAdapter.apply(x, None, weight, bias, a, b, kind)
    assert weight.shape in saved


def test_an_input_without_gradient_gets_none():
    x, weight, bias, a, b, dy = problem()
    out = FrozenLinearWithAdapter.apply(
        x.detach(), None, Halves(weight), bias, a, b, LinearKind(True, False, None, 1, 2.0)
    )
    assert all(g is not None for g in gradients(out, dy, a, b))


def test_small_adapters_vanish_in_bf16_only_where_they_are_combined():
    """`--lora-fusion-combine`: 1 + 1e-3 is 1 in bf16, however well the input agrees with A."""
    signs = torch.tensor([1.0, -1.0]).repeat(128)
    weight, x = signs.repeat(8, 1).bfloat16(), torch.ones(4, 1, 256).bfloat16()
    a, b = torch.full((1, 256), 5e-4).bfloat16(), torch.ones(8, 1).bfloat16()
    outs = {
        combine: FrozenLinearWithAdapter.apply(
            x, None, weight, None, a, b, LinearKind(True, False, None, 1, 2.0, combine=combine)
        )
        for combine in (False, True)
    }
    assert torch.equal(outs[True], x @ weight.t())
    torch.testing.assert_close(outs[False], torch.full_like(outs[False], 0.256), atol=2e-3, rtol=0)
