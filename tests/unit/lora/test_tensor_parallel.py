"""Adapters saved by tensor- and pipeline-parallel processes are the adapters of one, in every form that they have."""

import os

import pytest
from safetensors.torch import load_file

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


SEQUENCE = "--tensor-model-parallel-size 2 --sequence-parallel"
STAGES = "--pipeline-model-parallel-size 2"
# layout -> (processes, targets, flags)
LAYOUTS = {
    "tensor, whole linears": (2, "fused", SEQUENCE),
    "tensor, parts": (2, "parts", SEQUENCE),
    "uneven pipeline": (2, "parts", f"{STAGES} --num-layer-list 3,1"),
    "pipeline with empty places": (2, "parts", f"{STAGES} --noop-layers 0,5"),
    "tensor, interleaved pipeline": (4, "fused", f"{SEQUENCE} {STAGES} --num-layers-per-virtual-pipeline-stage 1"),
}


@pytest.fixture(scope="module")
def tune(toy_llama, rows, tmp_path_factory):
    """tune(targets, world size, flags) -> adapter checkpoint."""
    root, made = tmp_path_factory.mktemp("tuned"), {}

    def run(targets, world, flags=""):
        out = root / f"{len(made)}"
        if (targets, flags) not in made:
            words = f"{TUNE} --load {toy_llama} --data-path {rows} --lora-target-modules {TARGETS[targets]} {flags}"
            assert (
                pool(world).run(tune_here, f"{words} --save {out}".split(), world, str(root / "cache")) == [0] * world
            )
            made[targets, flags] = out
        return made[targets, flags]

    return run


@pytest.mark.parametrize("layout", LAYOUTS)
def test_processes_save_what_one_saves(layout, tune, toy_llama, convert_door, our_logits, hf_logits, tmp_path):
    world, targets, flags = LAYOUTS[layout]
    one, several = tune(targets, 1), tune(targets, world, flags)
    convert_door(f"--load-dir {toy_llama} --lora-load {several} --save-lora-to-hf --save-dir {tmp_path / 'peft'}")
    convert_door(f"--load-dir {toy_llama} --lora-load {several} --save-model-type hf --save-dir {tmp_path / 'merged'}")
    expected, found = our_logits(toy_llama, one), our_logits(toy_llama, several)
    moved = float((expected - our_logits(toy_llama)).abs().max())
    assert moved > 1e-2
    # under AdamW the first steps divide by tiny moments, so rounding differences of gradients show
    assert float((found - expected).abs().max()) < 1e-3 * moved
    others = (
        hf_logits(toy_llama, tmp_path / "peft"),
        our_logits(toy_llama, tmp_path / "peft"),
        hf_logits(tmp_path / "merged"),
    )
    assert all(float((other - found).abs().max()) < 1e-5 * float(found.abs().max()) for other in others)
    exported = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert {int(name.split(".layers.")[1].split(".")[0]) for name in exported} == {0, 1, 2, 3}
