"""Ranks that share each sequence train the same model as one process; attention alone is compared first, in fp64."""

import itertools
import json
import os
from contextlib import contextmanager, nullcontext
from unittest import mock

import pytest
import torch

from mindspeed_llm.checkpoint.toy import make_toy
from mindspeed_llm.testing.layouts import assert_same, compare, make_rows, train
from mindspeed_llm.testing.pool import pool

RING = "--context-parallel-algo megatron_cp_algo"
ULYSSES = "--context-parallel-algo ulysses_cp_algo"
HYBRID = "--context-parallel-algo hybrid_cp_algo --ulysses-degree-in-cp 2"

# Documents that end inside chunks, at their borders, and span several ranks.
DOCUMENTS = (0, 3, 16, 17, 41, 41, 64)


@contextmanager
def no_rescale():
    """Partial results are added up as they are."""
    from mindspeed_llm.parallel import context_ring

    def add(out, lse, part_out, part_lse):
        out += part_out
        torch.logaddexp(lse, part_lse, out=lse)

    with mock.patch.object(context_ring, "merge_part", add):
        yield


@contextmanager
def plain_positions():
    """Every rank takes its tokens for the first of the sequence."""
    from mindspeed_llm.training import step

    original = step.own_share

    def own_share(batch, split):
        share = original(batch, split)
        width = share.position_ids.shape[1]
        share.position_ids = torch.arange(width).expand(share.position_ids.shape)
        return share

    with mock.patch.object(step, "own_share", own_share):
        yield


@contextmanager
def gradients_stay():
    """Sums of key and value gradients are not passed on around the ring."""
    from mindspeed_llm.parallel.context_ring import INNER_SUMS, OUTER_SUMS, Circle, Transfer

    original = Circle.pass_on

    def pass_on(self, tensors, tag):
        return Transfer(list(tensors), (), []) if tag in (INNER_SUMS, OUTER_SUMS) else original(self, tensors, tag)

    with mock.patch.object(Circle, "pass_on", pass_on):
        yield


MISTAKES = {None: nullcontext, "no rescale": no_rescale, "positions": plain_positions, "sums stay": gradients_stay}


def attend(ulysses, ring_window, heads, groups, widths, bounds, window, mistake=None, masked=False):
    """Largest relative error of this rank's output and gradients against the formula on the whole sequence."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from mindspeed_llm.ops.attention import reference
    from mindspeed_llm.ops.attention_masked import masked_scores
    from mindspeed_llm.parallel.context_attention import ContextParallelAttention
    from mindspeed_llm.parallel.context_split import SequenceSplit
    from mindspeed_llm.parallel.setup import head_exchange_group, initialize_distributed

    ranks = dist.get_world_size()
    initialize_distributed(context_parallel_size=ranks, ulysses_size=ulysses)
    split = SequenceSplit(ranks, ulysses)
    length, (d, e) = DOCUMENTS[-1], widths
    generator = torch.Generator().manual_seed(3)
    batch = 1 if bounds else 2
    shapes = ((length, batch, heads, d), (length, batch, groups, d), (length, batch, groups, e))
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes)
    grad = torch.randn(length, batch, heads * e, generator=generator, dtype=torch.float64)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32) if bounds else None
    hidden = torch.rand(batch, 1, length, length, generator=generator) < 0.5 if masked else None
    if masked:
        hidden[:, :, 5] = True  # a query that sees nothing
        hidden[0, :, 9, 8:] = True  # and one that sees little, not even itself
        expected = masked_scores(q, k, v, hidden, 0.0, None)
    else:
        expected = reference(q, k, v, cu_seqlens=cu_seqlens, window_size=window)
    expected = [expected.detach(), *torch.autograd.grad(expected, (q, k, v), grad)]

    def cut(x):
        return torch.cat([x[a:b] for a, b in split.ranges(dist.get_rank(), length)])

    attention = ContextParallelAttention(
        split,
        parallel_state.get_context_parallel_group(),
        head_exchange_group(ulysses),
        ring_window=ring_window,
        window_size=window,
    )
    mine = [cut(x.detach()).requires_grad_() for x in (q, k, v)]
    with MISTAKES[mistake]():
        out = attention(*mine, cu_seqlens, hidden)
        found = [out.detach(), *torch.autograd.grad(out, mine, cut(grad))]
    return [float((f - cut(x)).abs().max() / x.abs().max()) for f, x in zip(found, expected)]


WAYS = {"ring": (1, 1), "double ring": (1, 2), "one inner ring": (1, 4), "exchange": (4, 1), "both": (2, 1)}


@pytest.mark.parametrize("bounds", [None, DOCUMENTS], ids=["one", "documents"])
@pytest.mark.parametrize("way", WAYS)
def test_attention_of_four_ranks_is_the_formula(way, bounds):
    for heads, groups, widths, window in (
        (4, 2, (8, 8), None),
        (8, 1, (4, 4), 7),
        (4, 4, (12, 8), None),
        (4, 2, (8, 8), 30),
    ):
        for errors in pool(4).run(attend, *WAYS[way], heads, groups, widths, bounds, window):
            assert max(errors) < 1e-12, (heads, groups, widths, window, errors)


@pytest.mark.parametrize("way", WAYS)
def test_attention_under_a_mask_of_any_form_is_the_formula(way):
    for errors in pool(4).run(attend, *WAYS[way], 8, 2, (8, 4), None, None, None, True):
        assert max(errors) < 1e-12


def test_the_comparison_under_a_mask_notices():
    found = pool(4).run(attend, 1, 1, 4, 2, (8, 8), None, None, "no rescale", True)
    assert max(max(errors) for errors in found) > 1e-3


@pytest.mark.parametrize("mistake", ["no rescale", "sums stay"])
def test_the_comparison_of_attention_notices(mistake):
    found = pool(4).run(attend, 1, 1, 4, 2, (8, 8), None, None, mistake)
    assert max(max(errors) for errors in found) > 1e-3


@pytest.fixture(scope="module")
def windowed(tmp_path_factory):
    """A Mistral whose window is shorter than its rows, with one key head."""
    directory = tmp_path_factory.mktemp("toy") / "mistral"
    return make_toy("mistral", directory, sliding_window=9, num_key_value_heads=1)


@pytest.fixture(scope="module")
def stretched(tmp_path_factory):
    """A Llama that changes its frequencies for rows of more than 20 tokens, of which one rank sees the middle only."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 20, "factor": 4.0}
    rope |= {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    directory = tmp_path_factory.mktemp("toy") / "stretched"
    return make_toy("llama", directory, rope_scaling=rope)


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory):
    """Latent attention, experts whose router counts tokens, multi-token prediction."""
    return make_toy("deepseek_v3", tmp_path_factory.mktemp("toy") / "deepseek")


@pytest.fixture(scope="module")
def models(toy_llama, toy_qwen, windowed, stretched, deepseek):
    named = {"llama": toy_llama, "qwen": toy_qwen, "windowed": windowed, "stretched": stretched}
    return named | {"deepseek": deepseek}


JOINED = "--micro-batch-size 2"
PADDED = "--micro-batch-size 2 --no-padding-free"
ROWS = {"documents": make_rows(4, documents=3), "rows": make_rows(4)}
KNOWN = {}


def mistaken(mistake, *arguments):
    """`train` with one of the mistakes above."""
    with MISTAKES[mistake]():
        return train(*arguments)


def alone(models, model, batch, rows, more=""):
    """The same steps in one process, computed once."""
    key = (model, batch, rows, more)
    if key not in KNOWN:
        (KNOWN[key],) = pool(1).run(train, str(models[model]), f"{batch} {more}", ROWS[rows])
    return KNOWN[key]


# Losses of the router, which leave out the padding that sharing a row takes.
BALANCED = "--moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 0.1 --moe-z-loss-coeff 0.01"

TWO = [
    ("llama", JOINED, "documents", RING, ""),
    ("llama", JOINED, "documents", ULYSSES, ""),
    ("llama", PADDED, "rows", RING, "--recompute-granularity selective"),
    ("llama", PADDED, "rows", ULYSSES, "--recompute-granularity full --recompute-method uniform "
     "--recompute-num-layers 1"),
    ("windowed", JOINED, "documents", RING, ""),
    ("windowed", PADDED, "rows", ULYSSES, ""),
    ("stretched", PADDED, "rows", RING, ""),
    ("llama", JOINED, "documents", RING, "--lora-r 4"),
    ("deepseek", JOINED, "documents", RING, BALANCED),
    ("deepseek", PADDED, "rows", ULYSSES, BALANCED),
]  # fmt: skip


@pytest.mark.parametrize("model, batch, rows, way, more", TWO)
def test_two_ranks_train_as_one(models, model, batch, rows, way, more):
    flags = f"{batch} --context-parallel-size 2 {way} {more}"
    found = pool(2).run(train, str(models[model]), flags, ROWS[rows])[0]
    assert_same(found, alone(models, model, batch, rows, more))


FOUR = [
    ("llama", JOINED, "documents", f"--context-parallel-size 4 {HYBRID}"),
    ("llama", PADDED, "rows", f"--context-parallel-size 4 {RING} --cp-window-size 2"),
    ("windowed", JOINED, "documents", f"--context-parallel-size 4 {ULYSSES}"),
    ("llama", JOINED, "documents", f"--context-parallel-size 2 {RING} --tensor-model-parallel-size 2 "
     "--sequence-parallel"),
    ("qwen", PADDED, "rows", f"--context-parallel-size 2 {ULYSSES} --tensor-model-parallel-size 2"),
    ("llama", JOINED, "documents", f"--context-parallel-size 2 {RING} --pipeline-model-parallel-size 2"),
    ("llama", JOINED, "documents", f"--context-parallel-size 2 {RING} --use-distributed-optimizer "
     "--overlap-grad-reduce --overlap-param-gather"),
]  # fmt: skip


@pytest.mark.parametrize("model, batch, rows, flags", FOUR)
def test_four_ranks_train_as_one(models, model, batch, rows, flags):
    found = pool(4).run(train, str(models[model]), f"{batch} {flags}", ROWS[rows])[0]
    assert_same(found, alone(models, model, batch, rows))


def test_rows_of_an_odd_length_are_filled_up(models):
    rows = make_rows(4, longest=23, equal=True)
    flags = "--seq-length 23 --micro-batch-size 2"
    arguments = (rows, 2, "sgd", 0.1, "pretrain")
    (expected,) = pool(1).run(train, str(models["llama"]), flags, *arguments)
    found = pool(4).run(train, str(models["llama"]), f"{flags} --context-parallel-size 4", *arguments)[0]
    assert_same(found, expected)
    assert found.trained_tokens == [4 * 22] * 2


@pytest.mark.parametrize("mistake", ["no rescale", "positions", "sums stay"])
def test_the_comparison_of_training_notices(models, mistake):
    flags = f"{JOINED} --context-parallel-size 2 {RING}"
    found = pool(2).run(mistaken, mistake, str(models["llama"]), flags, ROWS["documents"])[0]
    difference = compare(found, alone(models, "llama", JOINED, "documents"))
    assert max(difference.loss, difference.gradient) > 1e-3


def test_the_comparison_notices_a_loss_averaged_on_each_rank(models):
    flags = f"{JOINED} --context-parallel-size 2 {RING}"
    arguments = (flags, ROWS["documents"], 3, "sgd", 0.1, "posttrain", "loss mean per rank")
    found = pool(2).run(train, str(models["llama"]), *arguments)[0]
    assert compare(found, alone(models, "llama", JOINED, "documents")).gradient > 1e-3


def post_train(words, cache):
    """Training losses of the post-training door on this rank (known on the last)."""
    import torch.distributed as dist

    from mindspeed_llm.cli.training import run_door
    from mindspeed_llm.config.parser import parse

    world = str(dist.get_world_size())
    here = {"WORLD_SIZE": world, "RANK": str(dist.get_rank()), "LOCAL_WORLD_SIZE": world, "MINDSPEED_LLM_CACHE": cache}
    with mock.patch.dict(os.environ, here):
        result = run_door(parse("posttrain", [*words.split(), "--progress", "lines", "--num-threads", "1"]))
    return [loss for _, loss in result.history.train]


def test_a_run_goes_on_with_the_dropout_of_every_rank_or_at_another_layout(toy_llama, tmp_path):
    rows = [{"instruction": "count", "input": "", "output": "and one " * (n + 3)} for n in range(8)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    common = f"--data-path {tmp_path}/rows.json --prompt-type chatml --split 1 --seq-length 128 --global-batch-size 4 "
    common += "--lr 1e-3 --train-iters 4 --use-distributed-optimizer"
    shared = f"{common} --context-parallel-size 2"
    cache = str(tmp_path / "cache")

    def steps(processes, words):
        return pool(processes).run(post_train, words, cache)[-1]

    for dropout, layouts, rel in (("--hidden-dropout 0.2", [(2, shared)], 0), ("", [(1, common), (4, shared)], 1e-5)):
        start = f"--load {toy_llama} {dropout} {shared}"
        whole = steps(2, start)
        for number, (processes, words) in enumerate(layouts):
            out = tmp_path / f"out{dropout[-1:]}{number}"
            first = steps(2, f"{start} --save {out} --exit-interval 2")
            last = steps(processes, f"--load {out} {dropout} {words} --save {out}")
            assert first + last == pytest.approx(whole, rel=rel, abs=0)


def drawn(sizes):
    """What this rank's default stream gives first."""
    from mindspeed_llm.parallel.setup import initialize_distributed

    initialize_distributed(**sizes)
    return float(torch.rand(()))


def test_shares_of_a_sequence_draw_other_dropout_masks_and_copies_the_same():
    assert len(set(pool(2).run(drawn, {"context_parallel_size": 2}))) == 2
    assert len(set(pool(2).run(drawn, {"tensor_parallel_size": 2}))) == 1


def order_of_events():
    """What a rank of a ring does in a forward and a backward pass, in its order."""
    from mindspeed_llm.parallel import context_ring

    events, send, compute = [], context_ring.dist.batch_isend_irecv, context_ring.attention_part
    back = context_ring.attention_part_backward

    def noted(name, function):
        def call(*arguments, **named):
            events.append(name(arguments) if callable(name) else name)
            return function(*arguments, **named)

        return call

    def kind(arguments):
        sums = (context_ring.OUTER_SUMS, context_ring.INNER_SUMS)
        return "sums" if arguments[0][0].tag in sums else "keys"

    with (
        mock.patch.object(context_ring.dist, "batch_isend_irecv", noted(kind, send)),
        mock.patch.object(context_ring, "attention_part", noted("compute", compute)),
        mock.patch.object(context_ring, "attention_part_backward", noted("back", back)),
    ):
        attend(1, 1, 4, 2, (8, 8), None, None)
    return [event for event, _ in itertools.groupby(events)]


def test_the_next_keys_are_under_way_while_a_rank_computes():
    # The parts of the last keys follow those of the last but one: nothing is sent between them.
    forward = ["keys", "compute"] * 3
    backward = ["keys", "back", "sums"] * 3 + ["back", "sums"]
    assert pool(4).run(order_of_events) == [forward + backward] * 4
