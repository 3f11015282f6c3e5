"""Fused adapters compute what base and adapter one after the other compute, with fewer collectives, however late these.

What is late happens only when it is waited for; what is not waited for never does.
"""

import contextlib
import itertools
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.tensor_parallel import layers, mappings

from mindspeed_llm.lora.function import FrozenLinearWithAdapter, LinearKind, Schedule
from mindspeed_llm.lora.fusion import exchange
from mindspeed_llm.lora.fusion.cost import CHUNKS
from mindspeed_llm.testing.layouts import assert_same, make_rows, train
from mindspeed_llm.testing.pool import pool

SP = "--tensor-model-parallel-size {} --sequence-parallel"
LORA = "--lora-r 4 --lora-alpha 8"
ROWS = make_rows(8)
COLLECTIVES = {
    "all_gather_into_tensor": 0, "reduce_scatter_tensor": 0, "all_to_all_single": 0, "all_reduce": None,
}  # fmt: skip


class Late:
    """A collective that happens when it is waited for."""

    def __init__(self, run, waits):
        self.run, self.waits = run, waits

    def wait(self):
        if self.waits:
            self.run()


@contextlib.contextmanager
def watched(late=False, forget=False):
    """Counts collectives by name; asynchronous ones are done at `wait`, or never."""
    counts = dict.fromkeys(COLLECTIVES, 0)
    with contextlib.ExitStack() as stack:
        for name, result in COLLECTIVES.items():
            original = getattr(dist, name)

            def call(*args, name=name, result=result, original=original, async_op=False, **keywords):
                counts[name] += 1
                if not (async_op and late):
                    return original(*args, async_op=async_op, **keywords)
                if result is not None:
                    args[result].fill_(float("nan"))
                return Late(lambda: original(*args, **keywords), waits=not forget)

            stack.enter_context(mock.patch.object(dist, name, call))
            if late:
                stack.enter_context(mock.patch.object(dist, "irecv", late_receive(dist.irecv, waits=not forget)))
            # megatron-core's own names for two of them; those of its buffers it waits for as a bundle, not one by one
            for module, stands_in in ((mappings, call), (layers, call), (param_and_grad_buffer, original)):
                if own := {
                    "all_gather_into_tensor": "dist_all_gather_func",
                    "reduce_scatter_tensor": "dist_reduce_scatter_func",
                }.get(name):
                    stack.enter_context(mock.patch.object(module, own, stands_in))
        yield counts


def late_receive(original, waits):
    """irecv into memory of its own, which is copied when it is waited for, or never (gloo needs the wait still)."""

    def receive(tensor, **keywords):
        arriving = torch.empty_like(tensor)
        work = original(arriving, **keywords)
        tensor.fill_(float("nan"))
        return Late(lambda: (work.wait(), tensor.copy_(arriving if waits else tensor)), True)

    return receive


class Fixed(LinearKind):
    """A kind whose schedule is given."""

    planned = Schedule()

    def schedule(self, size):
        return self.planned


def whole_problem(t, batch=2, rank=3):
    """A linear with an adapter as one process has it, fp64: x, keep mask, W, bias, A, B, dy."""
    generator = torch.Generator().manual_seed(0)
    s, inner, outer = 9 * t, 6 * t, 5 * t

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    keep = (torch.rand(s, batch, inner, generator=generator, dtype=torch.float64) > 0.3) / 0.7
    return draw(s, batch, inner), keep, draw(outer, inner), draw(outer), draw(rank, inner), draw(outer, rank), keep


def share(x, axis, t, rank):
    return x if axis is None else x.chunk(t, axis)[rank].contiguous()


def compare(column, sequence_parallel, dropout, bias, chunks, merge, late=False, forget=False, wrong_scale=False):
    """Largest difference of output and gradients, on this rank, from those of one process."""
    t, me = dist.get_world_size(), dist.get_rank()
    x, keep, weight, offset, a, b, _ = whole_problem(t)
    dy = torch.randn(x.shape[0], x.shape[1], weight.shape[0], generator=torch.Generator().manual_seed(1)).double()
    offset = offset if bias and column else None
    x, a, b = (tensor.requires_grad_() for tensor in (x, a, b))
    y = x @ weight.t() + 2.0 * ((x * keep if dropout else x) @ a.t()) @ b.t()
    y = y if offset is None else y + offset
    y.backward(dy)
    rows = 0 if sequence_parallel else None
    of_x, of_y, of_w = (rows, 2, 0) if column else (2, rows, 1)
    of_a, of_b = (None, 0) if column else (1, None)
    own = [share(tensor.detach(), axis, t, me) for tensor, axis in ((x, of_x), (a, of_a), (b, of_b))]
    own_x, own_a, own_b = (tensor.clone().requires_grad_() for tensor in own)
    kind = Fixed(column, sequence_parallel, dist.group.WORLD, t, 4.0 if wrong_scale else 2.0)
    object.__setattr__(kind, "planned", Schedule(chunks, merge))
    dropped = own_x * share(keep, of_x, t, me) if dropout else None
    own_offset = None if offset is None else share(offset, 0, t, me)
    with watched(late, forget):
        out = FrozenLinearWithAdapter.apply(own_x, dropped, share(weight, of_w, t, me), own_offset, own_a, own_b, kind)
        out.backward(share(dy, of_y, t, me))
    if sequence_parallel:  # as megatron does with gradients that are shares of a sum
        dist.all_reduce((own_a if column else own_b).grad)
    pairs = [(out, share(y, of_y, t, me)), (own_x.grad, share(x.grad, of_x, t, me))]
    pairs += [(own_a.grad, share(a.grad, of_a, t, me)), (own_b.grad, share(b.grad, of_b, t, me))]
    return max(float((found - expected).abs().max().nan_to_num(nan=1e9)) for found, expected in pairs)


def compare_all(late):
    """The worst case, and which it is."""
    cases = itertools.product((True, False), (True, False), (True, False), CHUNKS, (True, False))
    # dropout and bias together or neither
    cases = [(column, sp, both, both, chunks, merge) for column, sp, both, chunks, merge in cases]
    return max((compare(*case, late), case) for case in cases)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("late", [False, True])
def test_every_schedule_of_every_form_is_the_plain_sum(ranks, late):
    for worst, case in pool(ranks).run(compare_all, late):
        assert worst < 1e-11, case


@pytest.mark.parametrize("column", [True, False])
@pytest.mark.parametrize("merge", [True, False])
def test_a_collective_that_is_not_waited_for_is_noticed(column, merge):
    assert min(pool(2).run(compare, column, True, False, False, 4, merge, True, True)) > 1e-3
    assert min(pool(2).run(compare, column, False, False, False, 4, merge, True, True)) > 1e-3


def kept(chunks, merge):
    """Bytes that saved tensors hold beyond their own, in every form."""
    t, surplus = dist.get_world_size(), []
    for column, sequence_parallel in itertools.product((True, False), (True, False)):
        x = torch.randn(8, 2, 12, requires_grad=True)
        a, b = torch.randn(3, 12, requires_grad=True), torch.randn(10, 3, requires_grad=True)
        kind = Fixed(column, sequence_parallel, dist.group.WORLD, t, 2.0)
        object.__setattr__(kind, "planned", Schedule(chunks, merge))

        def pack(tensor):
            surplus.append(tensor.untyped_storage().nbytes() - tensor.numel() * tensor.element_size())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            FrozenLinearWithAdapter.apply(x, None, torch.randn(10, 12), None, a, b, kind)
    return surplus


@pytest.mark.parametrize("chunks", [1, 4])
def test_what_waits_for_the_backward_pass_holds_no_more_than_itself(chunks):
    for merge in (True, False):
        assert all(set(found) == {0} and len(found) == 20 for found in pool(2).run(kept, chunks, merge))


def with_large_messages(function, *arguments):
    """Each message is sent by itself, whatever its size."""
    with mock.patch.object(exchange, "LARGE", 0):
        return function(*arguments)


def test_messages_sent_by_themselves_bring_the_same():
    for worst, case in pool(3).run(with_large_messages, compare_all, True):
        assert worst < 1e-11, case
    for worst, case in pool(2).run(with_large_messages, compare_all, False):
        assert worst < 1e-11, case


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_a_message_sent_by_itself_that_is_not_waited_for_is_noticed(sequence_parallel):
    arguments = (compare, True, sequence_parallel, False, False, 4, True, True, True)
    assert min(pool(2).run(with_large_messages, *arguments)) > 1e-3


def test_a_wrong_scaling_is_noticed():
    assert min(pool(2).run(compare, True, True, False, False, 2, True, False, False, True)) > 1e-2


class AsOnWires:
    """A backend other than gloo, for what depends on the name: one reduce-scatter, all gathers started at once."""

    def __enter__(self):
        from mindspeed_llm.lora.fusion import products

        self.patch = mock.patch.object(products, "replaces_collectives", lambda group: False)
        self.patch.start()

    def __exit__(self, *_):
        self.patch.stop()


def compare_as_on_wires():
    with AsOnWires():
        return compare_all(True)


def test_other_backends_scatter_by_one_collective():
    for worst, case in pool(2).run(compare_as_on_wires):
        assert worst < 1e-11, case


def count(flags, directory):
    """Collectives of forward and of backward of one layer, the second, by linear: {name: (forward, backward)}."""
    from mindspeed_llm.config.parser import parse
    from mindspeed_llm.lora.inject import adapted_modules
    from mindspeed_llm.plan.plan import resolve
    from mindspeed_llm.training.setup import build, start_processes

    words = f"--load {directory} --data-path none --seq-length 32 --global-batch-size 1 --lr 1e-4 --train-iters 1 "
    with mock.patch.dict("os.environ", WORLD_SIZE=str(dist.get_world_size())):
        plan = resolve(parse("posttrain", (words + flags).split()).config, [])
    start_processes(plan)
    model = build(plan).chunks[0]
    counts = {}
    for path, linear in adapted_modules(model).items():
        if "layers.1." not in path:
            continue
        cut = plan.sequence_parallel and linear.kind.column
        x = torch.randn(32 // dist.get_world_size() if cut else 32, 1, linear.lora_A.shape[1], requires_grad=True)
        with watched() as forward:
            out, _ = linear(x)
        with watched() as backward:
            out.sum().backward()
        counts[path.rsplit(".", 1)[-1]] = (sum(forward.values()), sum(backward.values()))
    return counts


WITHOUT = dict(linear_qkv=(0, 2), linear_proj=(2, 0), linear_fc1=(0, 2), linear_fc2=(2, 0))
WITH = dict.fromkeys(WITHOUT, (2, 2))
FUSED_WITHOUT = dict(linear_qkv=(0, 1), linear_proj=(1, 0), linear_fc1=(0, 1), linear_fc2=(1, 0))
FUSED_WITH = dict.fromkeys(WITH, (1, 1))


@pytest.mark.parametrize(
    "flags, expected",
    [
        (f"{SP.format(2)} --no-lora-fusion", WITH),
        (f"{SP.format(2)} --lora-fusion-chunks 1", FUSED_WITH),
        (f"{SP.format(2)} --lora-fusion-chunks 4", dict.fromkeys(WITH, (4, 4))),
        ("--tensor-model-parallel-size 2 --no-lora-fusion", WITHOUT),
        ("--tensor-model-parallel-size 2 --lora-fusion-chunks 1", FUSED_WITHOUT),
    ],
)
def test_collectives_of_a_layer(toy_llama, flags, expected):
    for found in pool(2).run(count, f"{flags} {LORA}", str(toy_llama)):
        assert found == expected


def train_late(*arguments):
    with watched(late=True):
        return train(*arguments)


@pytest.fixture(scope="module")
def alone(toy_qwen):
    return pool(1).run(train, str(toy_qwen), LORA, ROWS)[0]


@pytest.mark.parametrize(
    "extra",
    [
        f"{SP.format(2)} --no-lora-fusion",
        f"{SP.format(2)}",
        f"{SP.format(2)} --lora-fusion-chunks 4 --gradient-accumulation-fusion",
        f"{SP.format(2)} --lora-fusion-combine",
        "--tensor-model-parallel-size 2 --lora-fusion-chunks 2 --recompute-granularity full "
        "--recompute-method uniform --recompute-num-layers 1",
        f"{SP.format(2)} --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
    ],
)
def test_three_steps_are_those_of_one_process(alone, toy_qwen, extra):
    assert_same(pool(2).run(train_late, str(toy_qwen), f"{extra} {LORA}", ROWS)[0], alone)


@pytest.mark.parametrize("layout", [SP.format(2), "--tensor-model-parallel-size 2"])
def test_dropout_draws_the_same_with_and_without_fusion(toy_qwen, layout):
    flags = f"{layout} {LORA} --lora-dropout 0.2"
    fused = pool(2).run(train, str(toy_qwen), f"{flags} --lora-fusion-chunks 2", ROWS)[0]
    assert_same(fused, pool(2).run(train, str(toy_qwen), f"{flags} --no-lora-fusion", ROWS)[0])
    other = pool(2).run(train, str(toy_qwen), f"{layout} {LORA} --lora-fusion-chunks 2", ROWS)[0]
    with pytest.raises(AssertionError):
        assert_same(fused, other)
