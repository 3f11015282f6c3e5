"""Adapters of experts saved by several processes are those of one, in every form that they have."""

import os
from unittest import mock

import pytest
import torch.distributed as dist

from mindspeed_llm.checkpoint.toy import make_toy
from mindspeed_llm.testing.pool import pool

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SEQUENCE = "--tensor-model-parallel-size 2 --sequence-parallel"
TUNE = (
    "--stage sft --prompt-type chatml --seq-length 128 --lr 2e-2 --lr-decay-style constant --global-batch-size 4 "
    "--micro-batch-size 2 --split 1 --train-iters 3 --lora-r 4 --lora-alpha 12 --progress lines --num-threads 1 "
    "--lora-target-modules linear_qkv linear_proj gate_proj up_proj down_proj all-router"
)


def tune_here(words, cache):
    """Run the posttrain door on this rank."""
    from mindspeed_llm.cli.posttrain import main

    world = str(dist.get_world_size())
    with mock.patch.dict(os.environ, {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MINDSPEED_LLM_CACHE": cache}):
        return main(words)


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """Qwen2-MoE with a dense layer and shared experts."""
    sizes = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, shared_expert_intermediate_size=80)
    directory = tmp_path_factory.mktemp("experts") / "base"
    return str(make_toy("qwen2_moe", directory, num_key_value_heads=4, mlp_only_layers=[1], **sizes))


@pytest.fixture(scope="module")
def tuned_alone(experts, rows, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "out"
    words = f"{TUNE} --load {experts} --data-path {rows} --save {out}".split()
    assert pool(1).run(tune_here, words, str(out.parent / "cache")) == [0]
    return out


SAVING = {
    "tensor, experts": (2, f"{SEQUENCE} --expert-model-parallel-size 2 --expert-tensor-parallel-size 1"),
    "pipeline, experts": (4, "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2 --moe-grouped-gemm"),
    "tensor, pipeline, cut experts": (4, f"{SEQUENCE} --pipeline-model-parallel-size 2"),
}


@pytest.mark.parametrize("layout", SAVING)
def test_what_a_layout_saves_is_what_one_process_saves(
    layout, experts, tuned_alone, rows, our_logits, hf_logits, convert_door, tmp_path
):
    """And it is the same function beside the base, merged, and in peft."""
    world, flags = SAVING[layout]
    out = tmp_path / "out"
    words = f"{TUNE} --load {experts} --data-path {rows} --save {out} {flags}".split()
    assert pool(world).run(tune_here, words, str(tmp_path / "cache")) == [0] * world
    convert_door(f"--load-dir {experts} --lora-load {out} --save-lora-to-hf --save-dir {tmp_path / 'peft'}")
    convert_door(f"--load-dir {experts} --lora-load {out} --save-model-type hf --save-dir {tmp_path / 'merged'}")
    expected, found, base = (our_logits(experts, lora) for lora in (tuned_alone, out, None))
    moved = float((expected - base).abs().max())
    assert moved > 1e-2
    # under AdamW the first steps divide by tiny moments, so rounding differences of gradients show
    assert float((found - expected).abs().max()) < 1e-3 * moved
    for logits in (hf_logits(experts, tmp_path / "peft"), hf_logits(tmp_path / "merged")):
        assert float((logits - found).abs().max()) < 1e-5 * float(found.abs().max())


def test_magnitudes_of_cut_experts_are_saved_and_read_by_every_layout(
    experts, rows, our_logits, hf_logits, convert_door, tmp_path
):
    """Two steps by one process, the third by two that share experts: the function of three steps by one."""
    words, one, two = f"{TUNE} --load {experts} --data-path {rows}", tmp_path / "one", tmp_path / "two"
    cache = str(tmp_path / "cache")
    for more in (f"--use-dora --save {one}", f"--use-dora --save {two} --exit-interval 2"):
        assert pool(1).run(tune_here, f"{words} {more}".split(), cache) == [0]
    expected, before = our_logits(experts, one), our_logits(experts, two)
    assert pool(2).run(tune_here, f"{words} --save {two} --lora-load {two} {SEQUENCE}".split(), cache) == [0, 0]
    found, moved = our_logits(experts, two), float((expected - our_logits(experts)).abs().max())
    assert float((expected - before).abs().max()) > 1e-2 * moved
    assert float((found - expected).abs().max()) < 1e-3 * moved
    convert_door(f"--load-dir {experts} --lora-load {two} --save-model-type hf --save-dir {tmp_path / 'merged'}")
    assert float((hf_logits(tmp_path / "merged") - found).abs().max()) < 1e-5 * float(found.abs().max())
