"""Gradients are reduced and weights are gathered while layers compute: the same bits, and really meanwhile."""

from contextlib import ExitStack
from unittest import mock

import pytest
import torch

from mindspeed_llm.testing.layouts import make_rows, train
from mindspeed_llm.testing.pool import pool

REDUCE, SHARED = "--overlap-grad-reduce", "--use-distributed-optimizer"
GATHER = f"{REDUCE} --overlap-param-gather"
# Other buckets are other shares of a rank, and their squares are summed up in another order for the gradient norm.
RUN = "--lr 1e-3 --clip-grad 0"
# name -> options of both runs, and those of the overlapped one
CASES = {
    "gradients": ("", REDUCE),
    "gradients, shared optimizer": (SHARED, REDUCE),
    "weights": (SHARED, GATHER),
    "gradients, several micro-batches": ("--micro-batch-size 1", REDUCE),
    "weights, several micro-batches": (f"{SHARED} --micro-batch-size 1", GATHER),
    "gradients, adapters": ("--lora-r 4", REDUCE),
    "weights, adapters": (f"{SHARED} --lora-r 4", GATHER),
    "weights, bf16": (f"{SHARED} --bf16", GATHER),
}
ROWS = make_rows(8)
# Parameters of a bucket: several for each layer of the toy.
BUCKET = 3000


def train_in_buckets(changes, model, flags):
    """Three steps of AdamW with small buckets; `changes` of megatron's groups of buckets by name."""
    from megatron.core import distributed
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

    settings = distributed.DistributedDataParallelConfig
    with ExitStack() as stack:
        small = lambda **s: settings(**s, bucket_size=BUCKET)  # noqa: E731
        stack.enter_context(mock.patch.object(distributed, "DistributedDataParallelConfig", small))
        for name, change in changes.items():
            changed = change(getattr(_ParamAndGradBucketGroup, name))
            stack.enter_context(mock.patch.object(_ParamAndGradBucketGroup, name, changed))
        return train(model, flags, ROWS, 3, "adamw", 1e-3)


def same(found, expected):
    """Whether losses, first gradients and last weights are the same bits."""
    pairs = [(found.gradients[0], expected.gradients[0]), (found.weights, expected.weights)]
    return found.losses == expected.losses and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs
    )


@pytest.fixture(scope="module")
def plain(toy_qwen):
    """Runs without overlap, once for each set of options."""
    found = {}

    def run(flags):
        if flags not in found:
            found[flags] = pool(2).run(train_in_buckets, {}, str(toy_qwen), f"{RUN} {flags}")[0]
        return found[flags]

    return run


@pytest.mark.parametrize("case", CASES)
def test_no_bit_changes(toy_qwen, plain, case):
    flags, overlapped = CASES[case]
    found = pool(2).run(train_in_buckets, {}, str(toy_qwen), f"{RUN} {flags} {overlapped}")[0]
    assert same(found, plain(flags))


def train_without_reducing(model, flags):
    """The gradients of one group of buckets are never sent."""
    skipped = []

    def change(original):
        def start(group, *arguments, **keywords):
            skipped.append(group) if not skipped else None
            if group is not skipped[0]:
                return original(group, *arguments, **keywords)
            group.grad_reduce_handle = mock.Mock()

        return start

    return train_in_buckets({"start_grad_sync": change}, model, flags)


def test_a_group_that_is_not_reduced_is_noticed(toy_qwen):
    with pytest.raises(AssertionError, match="differs between ranks"):
        pool(2).run(train_without_reducing, str(toy_qwen), f"{RUN} {REDUCE}")


def events_of_training(model, flags):
    """In order: groups of buckets that are reduced or gathered, and layers that compute."""
    from mindspeed_llm.models.layer import DecoderLayer

    events = []

    def noting(event):
        def change(original):
            def call(group, *arguments, **keywords):
                events.append(event)
                return original(group, *arguments, **keywords)

            return call

        return change

    construct = DecoderLayer.__init__

    def watched(layer, *arguments, **keywords):
        construct(layer, *arguments, **keywords)
        layer.register_forward_pre_hook(lambda *_: events.append("layer"))
        layer.register_forward_hook(
            lambda _layer, _inputs, out: out[0].register_hook(lambda _grad: events.append("d layer")) and None
        )

    changes = {name: noting(name) for name in ("start_grad_sync", "finish_grad_sync", "start_param_sync")}
    with mock.patch.object(DecoderLayer, "__init__", watched):
        train_in_buckets(changes, model, flags)
    return events


def test_gradients_travel_before_the_backward_pass_ends(toy_qwen):
    """From the second step on: megatron-core learns in the first which gradients come."""
    for flags, overlaps in (("", False), (REDUCE, True)):
        events = pool(2).run(events_of_training, str(toy_qwen), f"{RUN} {flags}")[0]
        last_backward = len(events) - 1 - events[::-1].index("d layer")
        assert ("start_grad_sync" in events[:last_backward][-20:]) == overlaps


def test_weights_travel_while_layers_compute(toy_qwen):
    for flags, overlaps in ((SHARED, False), (f"{SHARED} {GATHER}", True)):
        events = pool(2).run(events_of_training, str(toy_qwen), f"{RUN} {flags}")[0]
        second = events[events.index("finish_grad_sync") :]
        forward = second[second.index("layer") : second.index("d layer")]
        assert ("start_param_sync" in forward) == overlaps
