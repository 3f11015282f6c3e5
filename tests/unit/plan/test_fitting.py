"""Changes that make a plan fit: each is planned, the cheapest stand first, and none is in another."""

import re
from unittest import mock

import pytest

from mindspeed_llm.config.parser import parse
from mindspeed_llm.plan import fitting, memory
from mindspeed_llm.plan.fitting import Change, changes, cheapest, planned
from mindspeed_llm.plan.plan import resolve
from mindspeed_llm.plan.show import plan_memory

SHAPE = (
    "--num-layers 8 --hidden-size 1024 --ffn-hidden-size 3584 --num-attention-heads 16 --group-query-attention "
    "--num-query-groups 4 --vocab-size 32000 --max-position-embeddings 4096 --normalization RMSNorm --swiglu "
    "--disable-bias-linear --untie-embeddings-and-output-weights "
)
RUN = "--bf16 --seq-length 2048 --micro-batch-size 4 --global-batch-size 16 --data-path none --train-iters 3 --dry-run "


def plan_of(words="", world=1, run=RUN):
    parsed = parse("pretrain", f"{SHAPE}{run}--world-size {world} {words}".split())
    return resolve(parsed.config, parsed.problems)


def again(words, world=1):
    """Bytes of a plan with the words that were advised, as a user would give them."""
    flag = re.compile(r"--\S+")
    run = RUN
    for changed in set(flag.findall(words)) & set(flag.findall(RUN)):
        run = re.sub(rf"{changed} \S+ ", "", run)
    return plan_memory(plan_of(words, world, run)).total


@pytest.mark.parametrize("share", [0.95, 0.8, 0.5])
def test_what_is_advised_fits_when_it_is_given(share):
    plan = plan_of()
    room = int(plan_memory(plan).total * share)
    found = cheapest(plan, room).fitting
    assert 1 <= len(found) <= 3
    for one in found:
        words, _, times = one.change.words().partition(" on ")
        total = again(words, one.change.processes)
        assert total == one.total <= room
        assert one.saved == plan_memory(plan).total - total > 0
        assert bool(times) == (one.change.processes > 1)


def test_the_cheapest_that_fit_stand_first_and_each_is_needed_as_a_whole():
    plan = plan_of()
    total = plan_memory(plan).total
    found = cheapest(plan, int(total * 0.95)).fitting
    assert [one.change.cost for one in found] == sorted(one.change.cost for one in found)
    assert found[0].change.options == {"recompute_activation_function": True}
    for one in found:
        for other in found:
            assert one is other or not one.change.options.items() <= other.change.options.items()
    # A part of what is advised together would not be enough, or it would be advised alone.
    several = [one for one in found if len(one.change.options) > 1]
    for one in several:
        for name, value in one.change.options.items():
            alone = planned(plan, Change({name: value}))
            assert alone is None or plan_memory(alone).total > int(total * 0.95) or name == "swap_attention"


def test_nothing_is_advised_where_nothing_fits():
    search = cheapest(plan_of(), 10**6)
    assert (search.fitting, search.complete) == ([], True) and search.tried > 100


def test_the_search_ends_when_time_is_up_and_says_so():
    search = cheapest(plan_of(), 10**6, seconds=0.0)
    assert (search.fitting, search.tried, search.complete) == ([], 0, False)
    enough = cheapest(plan_of(), 10**12, most=1)
    assert enough.complete and len(enough.fitting) == 1


def test_what_contradicts_in_pairs_is_not_planned_in_threes():
    asked = []

    def remember(plan, change):
        asked.append(change)
        return planned(plan, change)

    with mock.patch.object(fitting, "planned", remember):
        search = cheapest(plan_of(), 10**6)
    assert len(asked) == search.tried  # each once
    whole = [c for c in asked if {"recompute_granularity", "swap_attention"} <= c.options.keys()]
    assert [len(c.options) for c in whole if c.processes == 1] == [5]


def test_a_models_tensors_are_listed_once_for_each_way_to_cut_them():
    """Hundreds of plans are estimated; of a model with many experts one list takes seconds."""
    plan = plan_of()
    memory._sizes.cache_clear()
    with mock.patch.object(memory, "tensor_pairs", wraps=memory.tensor_pairs) as listed:
        cheapest(plan, 10**6)
    assert 1 <= listed.call_count <= 4


def test_no_change_stands_twice():
    for plan in (plan_of(), plan_of(world=2)):
        single = [(tuple(change.options.items()), change.processes) for change in changes(plan)]
        assert len(single) == len(set(single))


def test_what_a_run_has_already_is_not_advised():
    before = plan_of()
    words = "--recompute-norm --recompute-activation-function"
    names = {name for change in changes(plan_of(words)) for name in change.options}
    assert not {"recompute_norm", "recompute_activation_function"} & names
    assert {"recompute_norm", "recompute_activation_function"} <= {n for c in changes(before) for n in c.options}


def test_what_makes_no_difference_is_not_advised():
    """One process has nobody to share the optimizer with; two have."""

    def advised(plan):
        found = cheapest(plan, plan_memory(plan).total - 1, most=20).fitting
        return {name for one in found for name in one.change.options}

    assert "use_distributed_optimizer" not in advised(plan_of())
    assert "use_distributed_optimizer" in advised(plan_of(world=2))


def test_the_global_batch_stays_when_nobody_gave_it():
    parsed = parse("pretrain", (SHAPE + RUN.replace("--global-batch-size 16 ", "")).split())
    plan = resolve(parsed.config, parsed.problems)
    halved = next(change for change in changes(plan) if change.options.get("micro_batch_size") == 2)
    assert halved.words() == "--micro-batch-size 2 --global-batch-size 4"
    assert planned(plan, halved).global_batch_size == plan.global_batch_size == 4


def test_what_contradicts_the_run_is_not_planned():
    plan = plan_of("--recompute-granularity full --recompute-method uniform --recompute-num-layers 1")
    assert planned(plan, Change({"swap_attention": True})) is None


def test_words_and_prices():
    one = Change({"recompute_norm": True}, 0.01)
    other = Change({"micro_batch_size": 2}, says=("it depends",), order=0.2)
    both = one & other
    assert both.words() == "--recompute-norm --micro-batch-size 2"
    assert (one.price(), other.price(), both.price()) == (
        "about 1 % slower", "it depends", "about 1 % slower, it depends"
    )  # fmt: skip
    assert Change({"cross_entropy_loss_fusion": False}).words() == "--no-cross-entropy-loss-fusion"
    assert Change({}).price() == "no slower"
    assert both.cost == pytest.approx(0.21)
