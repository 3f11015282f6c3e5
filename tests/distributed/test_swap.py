"""Runs that swap activations are bit for bit those that do not, and hold less memory, in every layout."""

import time
from contextlib import contextmanager, nullcontext
from functools import partial
from unittest import mock

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mindspeed_llm.checkpoint.toy import make_toy
from mindspeed_llm.errors import UserError
from mindspeed_llm.testing.layouts import make_rows, train
from mindspeed_llm.testing.pool import pool

LAYERS = 8
ROWS = make_rows(4, longest=64, equal=True)
# Toys have no tensor of a megabyte.
SMALL = 1024
SWAP = "--swap-attention --swap-modules input_norm,self_attention,post_attention_norm,mlp --swap-budget 1"
INPUTS = "--swap-layer-input --swap-budget 1"
PP2, TP2 = "--pipeline-model-parallel-size 2", "--tensor-model-parallel-size 2 --sequence-parallel"
FULL = "--recompute-granularity full --recompute-num-layers"

# name -> (kind of model, processes, layout and what is trained, what swaps, part of the activations' peak that stays)
LAYOUTS = {
    "dense": ("qwen", 1, "", SWAP, 0.5),
    "dense as upstream": ("qwen", 1, "", "--swap-attention --swap-budget 1", 0.85),
    "dense, measured": ("qwen", 1, "", SWAP.replace("--swap-budget 1", ""), 1.0),
    "dense, batches joined": ("qwen", 1, "--micro-batch-size 2 --gradient-accumulation-fusion", SWAP, 0.5),
    "LoRA": ("qwen", 1, "--lora-r 4", SWAP, 0.5),
    "frozen layers": ("qwen", 1, "--trainable-layers last:4", SWAP, 0.8),
    "selective": ("qwen", 1, "--recompute-granularity selective", SWAP, 0.6),
    "parts recomputed": ("qwen", 1, "--recompute-norm --recompute-activation-function", SWAP, 0.7),
    "full": ("qwen", 1, f"{FULL} 1 --recompute-method uniform", INPUTS, 0.97),
    "block": ("qwen", 1, f"{FULL} 3 --recompute-method block", f"{SWAP} --swap-layer-input", 0.7),
    "experts": ("mixtral", 1, "", SWAP, 0.6),
    "stages": ("qwen", 2, PP2, SWAP, 0.7),
    "virtual stages": ("qwen", 2, f"{PP2} --num-virtual-stages-per-pipeline-rank 2", SWAP, 0.8),
    "stages with LoRA": ("qwen", 2, f"{PP2} --lora-r 4 {FULL} 1 --recompute-method uniform", INPUTS, 1.0),
    "tensors": ("qwen", 2, TP2, SWAP, 0.6),
    "fully sharded": ("qwen", 2, "--use-torch-fsdp2", SWAP, 0.9),
    "contexts": ("qwen", 2, "--context-parallel-size 2", SWAP, 0.7),
    # One layer, which ends the model where the prediction layers do not count.
    "prediction layers": ("predicting", 1, "", SWAP, 1.0),
    "experts apart": ("mixtral", 2, "--expert-model-parallel-size 2", SWAP, 0.6),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("toys")
    qwen = make_toy("qwen2", root / "qwen", tie_word_embeddings=True, num_hidden_layers=LAYERS)
    one = {"num_hidden_layers": 1, "first_k_dense_replace": 1, "num_nextn_predict_layers": 2}
    return {
        "qwen": str(qwen),
        "mixtral": str(make_toy("mixtral", root / "mixtral", num_hidden_layers=LAYERS)),
        "predicting": str(make_toy("deepseek_v3", root / "predicting", **one)),
    }


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operators have made and that somebody still holds."""

    def __init__(self):
        super().__init__()
        self.peak = self._total = 0
        self._live = {}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        given = {t.untyped_storage()._cdata for t in tree_leaves((arguments, keywords)) if isinstance(t, torch.Tensor)}
        result = function(*arguments, **keywords)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (address := tensor.untyped_storage()._cdata) not in given:
                storage = tensor.untyped_storage()
                self._live[address] = StorageWeakRef(storage), storage.nbytes()
                self._total += storage.nbytes()
        if self._total > self.peak:  # as if nothing had been freed since the last look
            self._live = {address: entry for address, entry in self._live.items() if not entry[0].expired()}
            self._total = sum(size for _, size in self._live.values())
            self.peak = max(self.peak, self._total)
        return result


def watched(model, flags, tamper=None):
    """Train on this rank, and watch the memory of forward and backward passes.

    Returns:
        What was trained, highest bytes of activations, and bytes swapped, late arrivals and bytes left on the host.
    """
    from mindspeed_llm.training import loop, setup
    from mindspeed_llm.training.step import run_batch
    from mindspeed_llm.training.swapping import swap_activations

    live, swaps = LiveBytes(), []

    def run_watched(*arguments, **keywords):
        with live:
            return run_batch(*arguments, **keywords)

    def remember(plan, chunks):
        swaps.append(swap_activations(plan, chunks))
        if swaps[-1] is not None:
            swaps[-1].small = SMALL
        return swaps[-1]

    with (
        mock.patch.object(loop, "run_batch", run_watched),
        mock.patch.object(setup, "swap_activations", remember),
        TAMPERINGS[tamper]() if tamper else nullcontext(),
    ):
        trained = train(model, flags, ROWS, steps=2, learning_rate=0.5)
    (swap,) = swaps
    return trained, live.peak, (swap.swapped_bytes, swap.late, swap.store.held) if swap else (0, 0, 0)


@contextmanager
def not_awaited(method):
    """A wait that does not wait, beside copies that take their time."""
    from mindspeed_llm.memory import mapped_store

    run = mapped_store._Job.run

    def slowly(job):
        time.sleep(0.003)
        run(job)

    owner = getattr(mapped_store, method.split(".")[0])
    with mock.patch.object(mapped_store._Job, "run", slowly):
        with mock.patch.object(owner, method.split(".")[1], lambda *arguments: None):
            yield


def one_row_off():
    """What comes back is shifted by a row."""
    from mindspeed_llm.memory.swapped import SavedView

    tensor = SavedView.tensor
    return mock.patch.object(SavedView, "tensor", lambda self: tensor(self).roll(1, 0))


TAMPERINGS = {
    "arrival not awaited": partial(not_awaited, "MappedStore.await_arrival"),
    "departure not awaited": partial(not_awaited, "_MappedCopy.wait_sent"),
    "one row off": one_row_off,
}


@pytest.fixture(scope="module")
def kept(models):
    """The same run without swap, once."""
    found = {}

    def run(kind, processes, flags):
        key = kind, processes, flags
        if key not in found:
            found[key] = pool(processes).run(watched, models[kind], flags)
        return found[key]

    return run


def assert_equal(found, expected):
    """Bit for bit."""
    assert found.losses == expected.losses
    for ours, theirs in zip([*found.gradients, found.weights], [*expected.gradients, expected.weights], strict=True):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("name", LAYOUTS)
def test_swapping_changes_memory_and_nothing_else(kept, models, name):
    kind, processes, flags, swap, staying = LAYOUTS[name]
    plain = kept(kind, processes, flags)
    swapped = pool(processes).run(watched, models[kind], f"{flags} {swap}")
    assert_equal(swapped[0][0], plain[0][0])
    for (_, peak, (away, late, left)), (_, peak_before, _) in zip(swapped, plain, strict=True):
        print(f"{name}: {peak} of {peak_before} = {peak / peak_before:.2f}, swapped {away}, late {late}")
        assert away > 0 and left == 0
        assert peak < staying * peak_before


@pytest.mark.parametrize("tamper", TAMPERINGS)
def test_a_mistake_in_swapping_is_noticed(kept, models, tamper):
    expected = kept("qwen", 1, "")[0][0]
    with pytest.raises((AssertionError, UserError)):
        assert_equal(pool(1).run(watched, models["qwen"], SWAP, tamper)[0][0], expected)
