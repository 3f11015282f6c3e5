"""What is computed while tokens travel to experts and back changes no bit, and really is computed meanwhile."""

import collections
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from mindspeed_llm.checkpoint.toy import make_toy
from mindspeed_llm.errors import UserError
from mindspeed_llm.models.moe import overlap
from mindspeed_llm.models.moe.experts import ExpertLinear
from mindspeed_llm.models.moe.shared_experts import SharedExperts
from mindspeed_llm.parallel import row_exchange
from mindspeed_llm.testing.layouts import make_rows, train
from mindspeed_llm.testing.pool import pool

EP2 = "--expert-model-parallel-size 2"
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
SHARED, PARTS = "--moe-shared-expert-overlap", "--moe-alltoall-overlap-comm"
FULL = (
    "--moe-expert-capacity-factor 1.0 --moe-pad-expert-input-to-capacity --no-padding-free --pad-to-seq-length "
    "--seq-length 24"
)
BALANCE = "--micro-batch-size 1 --moe-aux-loss-coeff 0.3 --moe-z-loss-coeff 0.01"
ADAPTERS = "--lora-r 4 --lora-target-modules all-linear"

# name -> processes, overlap, toy, options of both runs
CASES = {
    "shared": (2, SHARED, "gated", EP2),
    "parts": (2, PARTS, "gated", f"{EP2} --moe-grouped-gemm"),
    "parts alone": (2, PARTS, "many", EP2),
    "parts alone, stacked": (2, PARTS, "many", f"{EP2} --moe-grouped-gemm"),
    "parts in bf16": (2, PARTS, "many", f"{EP2} --moe-grouped-gemm --bf16"),
    "shared, whole experts": (2, SHARED, "gated", f"{EP2} {TP2} --expert-tensor-parallel-size 1"),
    "shared, cut experts": (4, SHARED, "gated", f"{EP2} {TP2}"),
    "parts, cut experts": (4, PARTS, "gated", f"{EP2} {TP2} --moe-grouped-gemm"),
    "shared, megatron's permutation": (2, SHARED, "gated", f"{EP2} --no-moe-permute-fusion"),
    "parts, megatron's permutation": (2, PARTS, "many", f"{EP2} --no-moe-permute-fusion"),
    "shared, capacity": (2, SHARED, "gated", f"{EP2} --moe-expert-capacity-factor 1.0"),
    "parts, full capacity": (
        2, PARTS, "gated",
        f"{EP2} {FULL} --no-moe-permute-fusion",
    ),
    "shared, full capacity": (
        2, SHARED, "gated", f"{EP2} {FULL}",
    ),
    "shared, layers recomputed": (
        2, SHARED, "gated",
        f"{EP2} --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    ),
    "parts, expert layers recomputed": (2, PARTS, "gated", f"{EP2} --moe-zero-memory level1"),
    "parts, experts recomputed": (
        2, PARTS, "many", f"{EP2} --moe-grouped-gemm --moe-zero-memory level0 --overlap-grad-reduce",
    ),
    "parts, activation recomputed": (2, PARTS, "gated", f"{EP2} --recompute-activation-function"),
    "shared experts recomputed": (
        2, SHARED, "gated", f"{EP2} --recompute-granularity selective --recompute-modules shared_experts",
    ),
    "shared, norm recomputed": (2, SHARED, "gated", f"{EP2} --recompute-norm"),
    "shared, adapters": (2, SHARED, "gated", f"{EP2} {ADAPTERS}"),
    "parts, adapters": (2, PARTS, "many", f"{EP2} {ADAPTERS}"),
    "parts, adapters, stacked, recomputed": (
        2, PARTS, "many", f"{EP2} {ADAPTERS} --moe-grouped-gemm --moe-zero-memory level0",
    ),
    "parts, adapters of cut experts": (4, PARTS, "gated", f"{EP2} {TP2} {ADAPTERS} --moe-grouped-gemm"),
    "parts, swapped": (
        2, PARTS, "gated",
        f"{EP2} --swap-attention --swap-modules mlp --swap-budget 1",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """One with shared experts and a gate, two experts a rank; one without shared experts, five a rank."""
    root = tmp_path_factory.mktemp("overlap")
    small = dict(num_hidden_layers=2, moe_intermediate_size=48, num_experts_per_tok=2)
    gated = dict(**small, num_experts=4, shared_expert_intermediate_size=80, num_key_value_heads=4)
    return {
        "gated": str(make_toy("qwen2_moe", root / "gated", **gated)),
        "many": str(make_toy("qwen3_moe", root / "many", **small, num_experts=10)),
    }


@pytest.fixture(scope="module")
def rows():
    return make_rows(4)


@pytest.fixture(scope="module")
def plain(toys, rows):
    """Runs without overlap, once for each set of options."""
    found = {}

    def run(processes, toy, flags):
        key = (processes, toy, flags)
        if key not in found:
            found[key] = pool(processes).run(train, toys[toy], f"{BALANCE} {flags}", rows, 2)[0]
        return found[key]

    return run


def differing(found, expected):
    """What is not the same bits in two runs."""
    names = ["loss"] * (found.losses != expected.losses)
    for step, (ours, theirs) in enumerate(zip(found.gradients, expected.gradients, strict=True)):
        assert ours.keys() == theirs.keys()
        names += [f"{name} in step {step}" for name in ours if not torch.equal(ours[name], theirs[name])]
    return names


@pytest.mark.parametrize("case", CASES)
def test_no_bit_changes(toys, rows, plain, case):
    processes, asked, toy, flags = CASES[case]
    found = pool(processes).run(train, toys[toy], f"{BALANCE} {flags} {asked}", rows, 2)[0]
    assert not differing(found, plain(processes, toy, flags))


class ColumnsFirst(overlap.Traffic):
    """Tokens are given to the experts in the order in which they arrive."""

    def sorted_by_expert(self, rows):
        return rows


class Hasty(row_exchange._Depart):
    """The gradient is taken for what it is before anything has come."""

    @staticmethod
    def backward(ctx, ticket):
        return torch.zeros_like(ctx.journey.wait()), None


class AnyOrder(overlap._Copies):
    """Gradients of one tensor are added in another order than without overlap."""

    @staticmethod
    def backward(ctx, *grads, as_it_is=overlap._Copies.backward):
        return as_it_is(ctx, *reversed(grads))


MISTAKES = {
    "rows not by expert": ("parts alone, stacked", overlap, "Traffic", ColumnsFirst),
    "gradients that have not arrived": ("shared", row_exchange, "_Depart", Hasty),
    "gradients added in another order": ("shared", overlap, "_Copies", AnyOrder),
}


def train_with_mistake(name, *arguments):
    """`train` with one of the mistakes."""
    _, module, attribute, wrong = MISTAKES[name]
    with mock.patch.object(module, attribute, wrong):
        return train(*arguments)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_noticed(toys, rows, plain, mistake):
    _, asked, toy, flags = CASES[MISTAKES[mistake][0]]
    arguments = (mistake, toys[toy], f"{BALANCE} {flags} {asked}", rows, 2)
    assert differing(pool(2).run(train_with_mistake, *arguments)[0], plain(2, toy, flags))


class Noted:
    """A handle that says when it is waited for."""

    def __init__(self, work, events):
        self.work, self.events = work, events

    def wait(self):
        self.events.append("arrives")
        return self.work.wait()


def events_of_training(model, flags, rows):
    """What happens in a step, in order: exchanges that leave and arrive, products of shared and routed experts."""
    events = []
    send, construct = dist.all_to_all_single, nn.Module.__init__

    def noted(*tensors, async_op=False, **keywords):
        if tensors[0].dim() == 1:  # routing weights, beside their tokens
            return send(*tensors, async_op=async_op, **keywords)
        events.append("leaves" if async_op else "waits all the way")
        work = send(*tensors, async_op=async_op, **keywords)
        return Noted(work, events) if async_op else work

    def watch(name):
        def note(_module, _inputs, output):
            events.append(name)
            output[0].register_hook(lambda _grad: events.append(f"d {name}"))

        return note

    def watching(module, *arguments, **keywords):
        construct(module, *arguments, **keywords)
        if isinstance(module, ExpertLinear):
            module.register_forward_hook(watch("expert"))

    initialize = SharedExperts.__init__

    def shared(module, *arguments, **keywords):
        initialize(module, *arguments, **keywords)
        module.linear_fc1.register_forward_hook(watch("shared 1"))
        module.linear_fc2.register_forward_hook(watch("shared 2"))

    with (
        mock.patch.object(dist, "all_to_all_single", noted),
        mock.patch.object(nn.Module, "__init__", watching),
        mock.patch.object(SharedExperts, "__init__", shared),
    ):
        train(model, flags, rows, 1)
    return events


def hidden(events):
    """What stands between leaving and arriving, of the exchanges in order of arrival; [] for one that hides nothing."""
    found, under_way = [], collections.deque()
    for event in events:
        if event == "leaves":
            under_way.append([])
        elif event == "arrives":
            found.append(under_way.popleft())
        else:
            for between in under_way:
                between.append(event)
    return found


@pytest.mark.fast
def test_shared_experts_compute_while_tokens_travel(toys):
    one = make_rows(2, equal=True)
    flags = f"--micro-batch-size 1 {EP2}"
    events = pool(2).run(events_of_training, toys["gated"], f"{flags} {SHARED}", one)[0]
    there, back, d_back, d_there = (hidden(events)[i] for i in (0, 1, 4, 5))
    assert there == ["shared 1"] and back == ["shared 2"]
    assert "d shared 2" in d_back and "d shared 1" in d_there
    assert not {"d expert", "expert"} & {*there, *back, *d_back, *d_there}
    before = pool(2).run(events_of_training, toys["gated"], flags, one)[0]
    assert "leaves" not in before and before.count("waits all the way") == 8


def test_experts_compute_while_tokens_of_others_travel(toys):
    """The first part's way there and the last one's way back are all that nothing hides."""
    flags = f"--micro-batch-size 1 {EP2} {PARTS}"
    events = pool(2).run(events_of_training, toys["many"], flags, make_rows(2, equal=True))[0]
    parts = len(overlap.sizes_of_parts(5))
    ways = hidden(events)
    assert len(ways) == 2 * 2 * 2 * parts  # layers, there and back, forward and backward
    idle = sum(not way for way in ways)
    assert idle <= 2 * 2 * 2
    assert any("expert" in way for way in ways) and any("d expert" in way for way in ways)


@pytest.mark.parametrize("experts", range(1, 12))
def test_parts_are_whole_experts(experts):
    sizes = overlap.sizes_of_parts(experts)
    assert sum(sizes) == experts and max(sizes) - min(sizes) <= 1 and 1 <= len(sizes) <= overlap.MOST_PARTS


REFUSED = {
    "nothing travels": (f"{SHARED}", "gated", "--expert-model-parallel-size of at least 2"),
    "no shared experts": (f"{EP2} {SHARED}", "many", "model without shared experts"),
    "all tokens in one piece": (
        f"{EP2} {PARTS} --moe-token-dispatcher-type allgather --no-padding-free --pad-to-seq-length",
        "gated", "alltoall",
    ),
    "capacities of several lengths": (
        f"{EP2} --moe-expert-capacity-factor 1.0 --moe-pad-expert-input-to-capacity", "gated", "rows of one length",
    ),
    "both": (f"{EP2} {PARTS} {SHARED}", "gated", "give one"),
    "one expert a rank": ("--expert-model-parallel-size 10 --world-size 10 --dry-run " + PARTS, "many", "at most 5"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_overlap_is_refused(toys, monkeypatch, case):
    from mindspeed_llm.config.parser import parse
    from mindspeed_llm.plan.plan import resolve

    flags, toy, why = REFUSED[case]
    monkeypatch.setenv("WORLD_SIZE", "2")
    parsed = parse("posttrain", f"--load {toys[toy]} --train-iters 1 {flags}".split())
    with pytest.raises(UserError, match=why):
        resolve(parsed.config, parsed.problems)
