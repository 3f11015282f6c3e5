"""Patches of the order of tokens in layers with experts."""

import types

import pytest
import torch
from megatron.core.transformer.moe import moe_utils

from mindspeed_llm import accelerator
from mindspeed_llm.patches.core.transformer.moe import moe_utils as patches

ORDERING = ("moe-permute", "moe-unpermute", "moe-sort-chunks")


def wrapped():
    """What the patches of the order of tokens make of megatron's functions."""
    found = {patch.name: patch for patch in patches.PATCHES if patch.name in ORDERING}
    names = {"moe-permute": "permute", "moe-unpermute": "unpermute", "moe-sort-chunks": "sort_chunks_by_idxs"}
    return {getattr(moe_utils, names[name]): found[name].wrap(getattr(moe_utils, names[name])) for name in ORDERING}


@pytest.mark.parametrize(
    "module, device, keeps",
    [
        ("transformer_engine.pytorch.permutation", "cuda", True),
        ("transformer_engine.pytorch.permutation", "cpu", False),
        ("of.a.stand_in", "cuda", False),
    ],
)
def test_kernels_of_transformer_engine_itself_are_kept(module, device, keeps, monkeypatch):
    monkeypatch.setattr(accelerator, "current", lambda: types.SimpleNamespace(name=device))
    kernel = types.FunctionType((lambda *a: None).__code__, {"__name__": module})
    monkeypatch.setattr(moe_utils, "fused_permute", kernel, raising=False)
    assert kernel.__module__ == module
    assert [new is original for original, new in wrapped().items()] == [keeps] * 3


def test_the_fused_order_is_the_plain_one(monkeypatch):
    monkeypatch.setattr(moe_utils, "fused_permute", None, raising=False)
    permute, unpermute, _ = wrapped().values()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(7, 4, generator=generator)
    routed = torch.rand(7, 5, generator=generator) > 0.4
    probs = torch.rand(7, 5, generator=generator) * routed
    size = int(routed.sum())
    (rows, _, order), (plain, _, plain_order) = (
        permute(tokens, routed, num_out_tokens=size, fused=f) for f in (True, False)
    )
    assert torch.equal(rows, plain)
    back, plain_back = (
        unpermute(r, o, tokens.shape, probs=probs, routing_map=routed, fused=f)
        for r, o, f in ((rows, order, True), (plain, plain_order, False))
    )
    torch.testing.assert_close(back, plain_back)
    assert not torch.equal(
        unpermute(rows.flip(0), order, tokens.shape, probs=probs, routing_map=routed, fused=True), back
    )
