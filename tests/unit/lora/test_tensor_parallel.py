"""Adapters saved by two tensor-parallel processes are the adapters of one."""

import os

import pytest

from mindspeed_llm.testing.pool import pool

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

TUNE = (
    "--stage sft --prompt-type chatml --seq-length 128 --lr 2e-2 --lr-decay-style constant --global-batch-size 4 "
    "--micro-batch-size 2 --split 1 --train-iters 3 --lora-r 4 --lora-alpha 12 --progress lines --num-threads 1"
)
TARGETS = {"fused": "all-linear", "parts": "q_proj v_proj o_proj up_proj down_proj"}


def tune_here(words, world_size, cache):
    """Run the posttrain door on this rank."""
    from mindspeed_llm.cli.posttrain import main

    changed = {"WORLD_SIZE": str(world_size), "MINDSPEED_LLM_CACHE": cache}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        return main(words)
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.mark.parametrize("targets", TARGETS)
def test_two_processes_save_what_one_saves(targets, toy_llama, rows, convert_door, our_logits, hf_logits, tmp_path):
    flags = f"{TUNE} --load {toy_llama} --data-path {rows} --lora-target-modules {TARGETS[targets]}"
    one, two = tmp_path / "one", tmp_path / "two"
    cache = str(tmp_path / "cache")
    assert pool(1).run(tune_here, f"{flags} --save {one}".split(), 1, cache) == [0]
    words = f"{flags} --save {two} --tensor-model-parallel-size 2 --sequence-parallel".split()
    assert pool(2).run(tune_here, words, 2, cache) == [0, 0]
    for directory in (one, two):
        convert_door(
            f"--load-dir {toy_llama} --lora-load {directory} --save-lora-to-hf --save-dir {directory / 'peft'}"
        )
    expected, found = our_logits(toy_llama, one), our_logits(toy_llama, two)
    moved = float((expected - our_logits(toy_llama)).abs().max())
    assert moved > 1e-2
    # under AdamW the first steps divide by tiny moments, so rounding differences of gradients show
    assert float((found - expected).abs().max()) < 1e-3 * moved
    exported = hf_logits(toy_llama, two / "peft")
    assert float((exported - found).abs().max()) < 1e-5 * float(found.abs().max())
    again = our_logits(toy_llama, two / "peft")
    assert float((again - found).abs().max()) < 1e-5 * float(found.abs().max())
