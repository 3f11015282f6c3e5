"""Routers behind layers that are recomputed as a whole leave padding out of their losses, as all others do."""

from unittest import mock

import pytest
import torch

from mindspeed_llm.checkpoint.toy import make_toy
from mindspeed_llm.testing.layouts import make_rows, train
from mindspeed_llm.testing.pool import pool

ROWS = make_rows(4, longest=16)
FLAGS = "--no-padding-free --micro-batch-size 2 --moe-z-loss-coeff 0.01 --moe-aux-loss-coeff 0.05"
BLOCK = "--recompute-granularity full --recompute-method block --recompute-num-layers 1"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    return str(make_toy("qwen3_moe", tmp_path_factory.mktemp("toy") / "moe", **sizes))


def run_here(model, flags, as_megatron=False):
    """One step in one process; `as_megatron` gives the mask to the recomputed layers alone: a mistake."""
    if not as_megatron:
        return train(model, flags, ROWS, 1)
    with mock.patch("mindspeed_llm.models.gpt.pass_padding_mask", lambda decoder: None):
        return train(model, flags, ROWS, 1)


def test_the_same_bits_as_without_recomputation(model):
    plain, block, wrong = (
        pool(1).run(run_here, model, *arguments)[0].gradients[0]
        for arguments in ((FLAGS,), (f"{FLAGS} {BLOCK}",), (f"{FLAGS} {BLOCK}", True))
    )
    assert plain and all(torch.equal(gradient, block[name]) for name, gradient in plain.items())
    router = "decoder.layers.3.mlp.router.weight"
    assert not torch.allclose(plain[router], wrong[router], rtol=1e-2)
