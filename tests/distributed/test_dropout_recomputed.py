"""What is recomputed under sequence parallelism drops what the forward pass dropped: the same bits as without."""

import functools
from unittest import mock

import pytest
import torch

from mindspeed_llm.testing.layouts import make_rows, train
from mindspeed_llm.testing.pool import pool

ROWS = make_rows(4, longest=16)
LAYOUT = "--tensor-model-parallel-size 2 --sequence-parallel --micro-batch-size 2"
DROPOUT = "--attention-dropout 0.1 --hidden-dropout 0.1"
TRAINED = {
    "all of the model": DROPOUT,
    "adapters": f"{DROPOUT} --lora-r 4 --lora-dropout 0.2 --lora-target-modules all-linear",
}
RECOMPUTED = {
    "layers": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "core attention": "--recompute-granularity selective",
}


def run_here(model, flags, nested=False):
    """Two steps on this rank; `nested` enters a rank's stream in layers that are inside of it already: a mistake."""
    from megatron.core import tensor_parallel

    def fork(config):
        return tensor_parallel.get_cuda_rng_tracker().fork()

    if not nested:
        return train(model, flags, ROWS, 2)
    with (
        mock.patch("mindspeed_llm.models.attention.stream_of_rank", fork),
        mock.patch("mindspeed_llm.lora.layers.stream_of_rank", fork),
    ):
        return train(model, flags, ROWS, 2)


@pytest.fixture(scope="module")
def plain(toy_llama):
    """What is trained -> the run that keeps everything."""
    return functools.cache(lambda name: pool(2).run(run_here, str(toy_llama), f"{LAYOUT} {TRAINED[name]}")[0])


def same_bits(found, expected):
    assert found.gradients[0].keys() == expected.gradients[0].keys() and expected.gradients[0]
    pairs = [(a[name], b[name]) for a, b in zip(found.gradients, expected.gradients, strict=True) for name in b]
    return found.losses == expected.losses and all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("recomputed", RECOMPUTED)
@pytest.mark.parametrize("trained", TRAINED)
def test_the_same_masks(plain, toy_llama, trained, recomputed):
    flags = f"{LAYOUT} {TRAINED[trained]} {RECOMPUTED[recomputed]}"
    assert same_bits(pool(2).run(run_here, str(toy_llama), flags)[0], plain(trained))


@pytest.mark.parametrize("trained", TRAINED)
def test_masks_of_a_stream_that_is_entered_twice_are_noticed(plain, toy_llama, trained):
    flags = f"{LAYOUT} {TRAINED[trained]}"
    assert same_bits(pool(2).run(run_here, str(toy_llama), flags, True)[0], plain(trained))
    recomputed = pool(2).run(run_here, str(toy_llama), f"{flags} {RECOMPUTED['layers']}", True)[0]
    assert not same_bits(recomputed, plain(trained))
