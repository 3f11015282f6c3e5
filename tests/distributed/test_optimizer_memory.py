"""Runs whose optimizer state is swapped, split or in bf16, alone and in pairs: weights, state and memory in layouts."""

from contextlib import nullcontext
from unittest import mock

import pytest
import torch

from mindspeed_llm.checkpoint.toy import make_toy
from mindspeed_llm.memory.optimizer_arrays import HostArray
from mindspeed_llm.testing import layouts
from mindspeed_llm.testing.layouts import make_rows, train
from mindspeed_llm.testing.pool import pool

ROWS = make_rows(4, longest=16, equal=True)
O2, SWAP, REUSE = "--o2-optimizer", "--swap-optimizer --swap-optimizer-times 5", "--reuse-fp32-param"
BF16 = "--bf16 --lr 1e-2"
FORMS = {
    "off": "",
    "o2": O2,
    "swap": SWAP,
    "reuse": REUSE,
    "o2 and swap": f"{O2} {SWAP}",
    "o2 and reuse": f"{O2} {REUSE}",
    "swap and reuse": f"{SWAP} {REUSE}",
}
# What stays on the device of a trained parameter in bf16: moments, and the fp32 weight or what the bf16 one lacks.
BYTES = {
    "off": 12, "o2": 8, "swap": 0, "reuse": 10.125, "o2 and swap": 0, "o2 and reuse": 6.125, "swap and reuse": 0,
}  # fmt: skip

# name -> (kind of model, processes, flags, forms)
LAYOUTS = {
    "one process": ("qwen", 1, BF16, list(FORMS)),
    "copies": ("qwen", 2, BF16, list(FORMS)),
    "distributed optimizer": ("qwen", 2, f"{BF16} --use-distributed-optimizer", list(FORMS)),
    "tensors": ("qwen", 2, f"{BF16} --tensor-model-parallel-size 2 --sequence-parallel", list(FORMS)),
    "stages": ("qwen", 2, f"{BF16} --pipeline-model-parallel-size 2", list(FORMS)),
    "gathers overlapped": (
        "qwen", 2, f"{BF16} --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
        ["off", "swap and reuse"],
    ),
    "experts": (
        "mixtral", 2, f"{BF16} --use-distributed-optimizer --expert-model-parallel-size 2", ["off", "swap", "reuse"]
    ),
    "LoRA": ("qwen", 1, f"{BF16} --lora-r 4", ["off", "swap", "reuse"]),
    "fp32": ("qwen", 1, "--lr 1e-2", ["off", "o2", "swap", "o2 and swap"]),
    "fp32, distributed optimizer": ("qwen", 2, "--lr 1e-2 --use-distributed-optimizer", ["off", "swap"]),
    "fp16": ("qwen", 1, "--fp16 --initial-loss-scale 1024 --lr 1e-2", ["off", "swap"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("toys")
    qwen = make_toy("qwen2", root / "qwen", tie_word_embeddings=True, num_hidden_layers=2)
    return {"qwen": str(qwen), "mixtral": str(make_toy("mixtral", root / "mixtral", num_hidden_layers=2))}


def held_bytes(optimizer):
    """Bytes of all storages that an optimizer holds, weights and gradients included, but no memory of a swap's file."""
    sizes, away, seen, left = {}, set(), set(), [optimizer]
    while left:
        found = left.pop()
        if id(found) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, torch.Tensor):
            sizes[found.untyped_storage().data_ptr()] = found.untyped_storage().nbytes()
        elif isinstance(found, dict):
            left += [*found.keys(), *found.values()]
        elif isinstance(found, list | tuple | set):
            left += found
        elif isinstance(found, HostArray):
            away.add(found.values.untyped_storage().data_ptr())
            left += found._kept._coming.values(), found._kept._going.values()
        elif type(found).__module__.startswith(("mindspeed_llm", "megatron.core.optimizer", "torch.optim")):
            left += getattr(found, "__dict__", {}).values()
    return sum(size for address, size in sizes.items() if address not in away)


class Look:
    """Looks at a run of `train`: its optimizer's state and the memory after the last step, and the estimate."""

    def __init__(self):
        self.make_optimizer, self.gather_parameters = layouts.make_optimizer, layouts.gather_parameters

    def make(self, plan, model, steps):
        from megatron.core import parallel_state

        from mindspeed_llm.plan.show import stages_memory

        self.plan = plan
        self.estimate = stages_memory(plan)[parallel_state.get_pipeline_model_parallel_rank()]
        self.optimizer, scheduler = self.make_optimizer(plan, model, steps)
        return self.optimizer, scheduler

    def gather(self, model):
        from mindspeed_llm.checkpoint.optimizer_state import own_states

        self.optimizer.zero_grad()
        self.bytes = held_bytes(self.optimizer)
        self.state = [{k: v.clone() for k, v in own.values().items()} for own in own_states(self.optimizer)]
        self.optimizer = None
        self.gather_parameters(model)

    def found(self, trained):
        numbers = sum(state["exp_avg"].numel() for state in self.state if state)
        return trained, self.state, self.bytes, self.estimate, numbers


def run(model, flags, forms, broken=None):
    """{form: (what was trained, state by number, bytes held after the last step, estimate, numbers of state here)}."""
    found = {}
    for form in forms:
        look = Look()
        with (
            mock.patch.object(layouts, "make_optimizer", look.make),
            mock.patch.object(layouts, "gather_parameters", look.gather),
            BREAKAGES[broken]() if broken else nullcontext(),
        ):
            found[form] = look.found(train(model, f"{flags} {FORMS[form]}", ROWS, optimizer="adamw"))
    return found


def assert_equal(found, expected):
    """Bit for bit, on every rank."""
    for ours, theirs in zip(found, expected, strict=True):
        assert ours[0].losses == theirs[0].losses
        for name, weight in theirs[0].weights.items():
            assert torch.equal(ours[0].weights[name], weight), name
        for one, other in zip(ours[1], theirs[1], strict=True):
            assert one.keys() == other.keys()
            assert all(one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_trained_is_the_same_in_less_memory(models, name):
    kind, processes, flags, forms = LAYOUTS[name]
    ranks = pool(processes).run(run, models[kind], flags, forms)
    results = {form: [rank[form] for rank in ranks] for form in forms}
    for form in forms:
        assert_equal(results[form], results["o2" if "o2" in form else "off"])
        for here, plain in zip(results[form], results["off"], strict=True):
            (*_, held, estimate, numbers), (*_, held_before, estimate_before, _) = here, plain
            print(f"{name}, {form}: {(held - held_before) / numbers:.3f} bytes a number")
            saved = estimate_before.optimizer - estimate.optimizer
            if "--bf16" in flags and "LoRA" not in name:
                assert abs(saved / numbers - (BYTES["off"] - BYTES[form])) < 0.6  # the estimate knows no padding
            # Slots begin at multiples of 64 numbers.
            assert abs(held_before - held - saved) < 0.05 * saved + 12 * 64 * 30
    if "o2" in forms:
        with pytest.raises(AssertionError):
            assert_equal(results["o2"], results["off"])


def not_rounded():
    """Masters that are not rounded into the weights."""
    from mindspeed_llm.memory.optimizer_masters import WholeMasters

    return mock.patch.object(WholeMasters, "give", lambda *arguments: None)


def not_kept():
    """The half that weights lack is not kept."""
    from mindspeed_llm.memory.optimizer_masters import SplitMasters

    take = SplitMasters.take

    def forgetful(self, pieces, stored):
        for half in stored:
            half.zero_()
        return take(self, pieces, stored)

    return mock.patch.object(SplitMasters, "take", forgetful)


def another_window():
    """What comes back is of the window before."""
    fetch = HostArray.fetch

    def shifted(self, start, stop):
        fetch(self, start, stop)
        _, memory = self._kept._coming[self._place(start)]
        self._kept.wait_fetched(self._place(start))
        self._kept._coming[self._place(start)] = mock.Mock(), memory.roll(64)

    return mock.patch.object(HostArray, "fetch", shifted)


BREAKAGES = {"not rounded": not_rounded, "not kept": not_kept, "another window": another_window}


@pytest.mark.parametrize("broken, form", [("not rounded", "swap"), ("not kept", "reuse"), ("another window", "swap")])
def test_a_mistake_is_noticed(models, broken, form):
    flags = LAYOUTS["distributed optimizer"][2]
    plain = [rank["off"] for rank in pool(2).run(run, models["qwen"], flags, ["off"])]
    found = [rank[form] for rank in pool(2).run(run, models["qwen"], flags, [form], broken)]
    with pytest.raises(AssertionError):
        assert_equal(found, plain)


def save(optimizer, chunks, root):
    """A checkpoint of weights and optimizer state; its directory."""
    from mindspeed_llm.checkpoint.train_save import SaveOrder, save_training
    from mindspeed_llm.checkpoint.training_state import bytes_to_write, training_state
    from mindspeed_llm.memory.optimizer_masters import SplitMasters

    state = training_state(chunks, optimizer, None, None)
    # How much room it needs is known without joining halves.
    with mock.patch.object(SplitMasters, "values", side_effect=AssertionError("joined")):
        outline = training_state(chunks, optimizer, None, None, outlines=True)
    assert bytes_to_write(outline) == bytes_to_write(state)
    return str(save_training(SaveOrder(root, 1, {"format": "torch_dist"}), state))


def train_and_save(model, flags, root):
    """Two steps, and a checkpoint."""
    look, found = Look(), []
    with (
        mock.patch.object(layouts, "make_optimizer", look.make),
        mock.patch.object(
            layouts, "gather_parameters", lambda built: found.append(save(look.optimizer, built.chunks, root))
        ),
    ):
        train(model, flags, ROWS, steps=2, optimizer="adamw")
    return found[0]


def load_and_save(model, flags, source, root):
    """What another run makes of a checkpoint, as one of its own."""
    import os
    from pathlib import Path

    import torch.distributed as dist

    from mindspeed_llm.checkpoint.optimizer_state import set_optimizer_step
    from mindspeed_llm.checkpoint.train_save import load_training
    from mindspeed_llm.checkpoint.training_state import training_state
    from mindspeed_llm.config.parser import parse
    from mindspeed_llm.plan.plan import resolve
    from mindspeed_llm.training.run import make_optimizer
    from mindspeed_llm.training.setup import build, start_processes

    here = {"WORLD_SIZE": dist.get_world_size(), "RANK": dist.get_rank(), "LOCAL_WORLD_SIZE": dist.get_world_size()}
    with mock.patch.dict(os.environ, {name: str(number) for name, number in here.items()}):
        words = f"--load {model} --data-path none --global-batch-size 4 --train-iters 2 --num-threads 1 {flags}"
        plan = resolve(parse("posttrain", words.split()).config, [])
        start_processes(plan)
    built = build(plan)
    optimizer, _ = make_optimizer(plan, built, 2)
    state = training_state(built.chunks, optimizer, None, None)
    set_optimizer_step(optimizer, load_training(Path(source), state)["optimizer_step"])
    del state
    return save(optimizer, built.chunks, root)


def stored(directory):
    """All tensors of a checkpoint, without the padding of vocabularies."""
    from mindspeed_llm.checkpoint.stored_boxes import StoredBoxes

    boxes = StoredBoxes(directory)
    tensors = {}
    for key in boxes.tensors:
        values = torch.empty(boxes.shape(key), dtype=boxes.dtype(key))
        assert boxes.read(key, [0] * values.dim(), values) == values.numel()
        tensors[key] = values[:997] if "embedding" in key else values
    return tensors


ONE, CUT, TENSORS = (1, BF16), (2, f"{BF16} --use-distributed-optimizer"), (2, LAYOUTS["tensors"][2])


@pytest.mark.parametrize("writer, written, reader, read", [
    (CUT, "swap and reuse", ONE, "off"), (ONE, "off", CUT, "swap and reuse"), (CUT, "off", TENSORS, "reuse"),
    (TENSORS, "o2 and swap", CUT, "o2 and reuse"), (ONE, "off", CUT, "o2"), (ONE, "o2", TENSORS, "swap"),
], ids=lambda value: value if isinstance(value, str) else str(value[0]))  # fmt: skip
def test_every_form_goes_on_from_every_other_at_another_layout(models, tmp_path, writer, written, reader, read):
    model = models["qwen"]
    source = pool(writer[0]).run(train_and_save, model, f"{writer[1]} {FORMS[written]}", tmp_path / "written")[0]
    copy = pool(reader[0]).run(load_and_save, model, f"{reader[1]} {FORMS[read]}", source, tmp_path / "read")[0]
    before, after = stored(source), stored(copy)
    assert before.keys() == after.keys() and len(before) == 4 * len([k for k in before if "optimizer" not in k])
    for key, values in before.items():
        moments = torch.bfloat16 if "o2" in read else torch.float32
        expected = values.to(moments) if "exp_avg" in key else values
        assert torch.equal(after[key], expected) and after[key].dtype == expected.dtype, key
        assert key.endswith("bias") or values.any(), key


def compare_copies(model, flags, flip):
    """The refusal of copies of the state that differ after a step, None if they are equal."""
    import torch.distributed as dist

    from mindspeed_llm.checkpoint.optimizer_state import own_states
    from mindspeed_llm.errors import UserError
    from mindspeed_llm.training.guards.replicas import check_replicas

    look, found = Look(), []

    def check(built):
        if dist.get_rank() == 1 and flip:
            own = list(own_states(look.optimizer))[3]
            values = own.values()
            values["fp32_param"].view(-1).view(torch.int32)[5] ^= 1 << 7
            own.accept(values)
        try:
            check_replicas(look.plan, built, look.optimizer, 1)
        except UserError as refused:
            found.append(str(refused))

    with (
        mock.patch.object(layouts, "make_optimizer", look.make),
        mock.patch.object(layouts, "gather_parameters", check),
    ):
        train(model, flags, ROWS, steps=1, optimizer="adamw")
    return found


@pytest.mark.parametrize("form", ["swap", "reuse"])
def test_copies_are_compared_where_they_lie(models, form):
    flags = f"{BF16} {FORMS[form]}"
    assert pool(2).run(compare_copies, models["qwen"], flags, False) == [[], []]
    for found in pool(2).run(compare_copies, models["qwen"], flags, True):
        assert len(found) == 1 and "(fp32_param)" in found[0]
