"""Pipelines of every kind train as one process: losses and gathered gradients of three steps."""

import json
import shutil

import pytest
import torch

from mindspeed_llm.errors import UserError
from mindspeed_llm.testing.layouts import EMBEDDING, assert_same, make_rows, train
from mindspeed_llm.testing.pool import pool

ROWS = make_rows(8)
PP2, PP4 = "--pipeline-model-parallel-size 2", "--pipeline-model-parallel-size 4"
VPP2 = f"{PP2} --num-virtual-stages-per-pipeline-rank 2"
ENDS = "--account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split"
TP2 = "--tensor-model-parallel-size 2"
OVERLAPS = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
UNIFORM = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
BLOCK = "--recompute-granularity full --recompute-method block --recompute-num-layers 1"
SELECTIVE = "--recompute-granularity selective"

# (processes, layout) of the tied Qwen2 toy: 4 layers, rows of 3 to 24 tokens, one sample per micro-batch.
LAYOUTS = [
    (2, PP2),
    (4, PP4),
    (2, f"{PP2} --num-layers-per-virtual-pipeline-stage 1"),
    (2, f"{PP2} --num-layer-list 3,1"),
    (2, f"{PP2} --noop-layers 0,5"),
    (2, f"{VPP2} --noop-layers 0,1,4,7"),  # the first chunk holds no layer at all
    (4, f"{PP4} --num-virtual-stages-per-pipeline-rank 2 {ENDS} --noop-layers 1,3"),
    (4, f"{PP2} {TP2}"),
    (4, f"{VPP2} {TP2} --sequence-parallel"),
    (4, f"{VPP2} {OVERLAPS}"),
    (8, f"{PP2} {TP2} --sequence-parallel {OVERLAPS}"),
]
# What is trained and how activations are kept, under an interleaved pipeline.
WAYS = [
    "--lora-r 4",
    f"--lora-r 4 {UNIFORM}",
    "--lora-r 4 --trainable final_layernorm",
    "--trainable-layers last:1",
    "--trainable-layers 0,2",
    "--freeze word_embeddings",
    "--micro-batch-size 2 --no-padding-free",
    UNIFORM,
    BLOCK,
    SELECTIVE,
]


@pytest.fixture(scope="module")
def alone(toy_qwen):
    """One process with these flags, once."""
    found = {}

    def run(flags=""):
        if flags not in found:
            found[flags] = pool(1).run(train, str(toy_qwen), flags, ROWS)[0]
        return found[flags]

    return run


@pytest.mark.parametrize("processes, layout", LAYOUTS)
def test_a_pipeline_trains_as_one_process(alone, toy_qwen, processes, layout):
    assert_same(pool(processes).run(train, str(toy_qwen), layout, ROWS)[0], alone())


@pytest.mark.parametrize("way", WAYS)
def test_an_interleaved_pipeline_trains_in_every_way(alone, toy_qwen, way):
    assert_same(pool(2).run(train, str(toy_qwen), f"{way} {VPP2}", ROWS)[0], alone(way))


def test_untied_embeddings(toy_llama):
    expected = pool(1).run(train, str(toy_llama), "", ROWS)[0]
    assert_same(pool(2).run(train, str(toy_llama), VPP2, ROWS)[0], expected)


def tied_copies(model, flags, rows):
    """This rank's copy of the tied embeddings after three steps of AdamW."""
    from mindspeed_llm.testing import layouts

    copies = []

    def keep(plan, chunks, values):
        names = {EMBEDDING, "output_layer.weight"}
        copies.extend(p.detach().clone() for chunk in chunks for n, p in chunk.named_parameters() if n in names)
        return {}

    original, layouts.gather = layouts.gather, keep
    try:
        layouts.train(model, flags, rows, optimizer="adamw", learning_rate=1e-3)
    finally:
        layouts.gather = original
    return copies[-1]


@pytest.mark.parametrize("flags", [PP2, f"{VPP2} --use-distributed-optimizer"])
def test_both_copies_of_tied_embeddings_stay_equal_bit_by_bit(toy_qwen, flags):
    first, last = pool(2).run(tied_copies, str(toy_qwen), flags, ROWS)
    assert torch.equal(first, last)


@pytest.mark.parametrize(
    "mutation, layout",
    [("no sum over tied embeddings", PP2), ("no sum over sequence shards", f"{TP2} --sequence-parallel")],
)
def test_the_comparison_notices(alone, toy_qwen, mutation, layout):
    with pytest.raises(AssertionError):
        found = pool(2).run(train, str(toy_qwen), layout, ROWS, 3, "sgd", 0.1, "posttrain", mutation)[0]
        assert_same(found, alone())


def initial_weights(model, flags, rows):
    """Weights drawn at this layout, gathered, before any step has changed them."""
    return train(model, flags + " --allow-random-init", rows, steps=1, learning_rate=0.0).weights


@pytest.mark.parametrize("adapters", ["", "--lora-r 4"])
@pytest.mark.parametrize(
    "processes, layout", [(2, VPP2), (2, f"{PP2} --num-layer-list 3,1"), (4, f"{PP2} {TP2} --noop-layers 1,3")]
)
def test_initial_weights_do_not_depend_on_the_layout(toy_qwen, tmp_path, processes, layout, adapters):
    """A directory with config.json alone has no weights to load."""
    shutil.copyfile(toy_qwen / "config.json", tmp_path / "config.json")
    flags = f"{adapters} --hf-config {tmp_path}"
    empty = tmp_path / "empty"
    empty.mkdir()
    expected = pool(1).run(initial_weights, str(empty), flags, ROWS)[0]
    found = pool(processes).run(initial_weights, str(empty), f"{flags} {layout}", ROWS)[0]
    assert found.keys() == expected.keys() and (not adapters or any("lora_A" in name for name in found))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def refusal(model, flags, rows):
    """The plan's problem."""
    with pytest.raises(UserError) as refused:
        train(model, flags, rows)
    return str(refused.value)


@pytest.mark.parametrize(
    "flags, line",
    [
        (f"{VPP2} --micro-batch-size 4 --noop-layers 0", "4 layers + 1 no-op layers over 2 stages x 2 virtual"),
        (f"{PP2} --num-layer-list 4", "need 2 positive numbers that sum to 4; try: 2,2"),
        (f"{VPP2} --num-layer-list 2,2", "cannot be combined with virtual pipeline"),
        (f"{VPP2} --num-layers-per-virtual-pipeline-stage 1", "exclude each other"),
        (f"{VPP2} --micro-batch-size 8", "micro-batches 1 % pipeline parallel 2 = 0 (virtual pipeline) does not hold; "
         "legal: nearest for --global-batch-size: 16, 32"),
        (ENDS, "need pipeline-parallel-size > 1"),
    ],
)  # fmt: skip
def test_splits_that_do_not_work_are_refused(toy_qwen, flags, line):
    assert line in pool(2).run(refusal, str(toy_qwen), flags, ROWS)[0]


def test_the_map_that_builds_is_the_map_that_is_shown(toy_qwen):
    """Two virtual stages without the count of a rank: what the plan records is what megatron builds."""
    built = pool(2).run(layers_built, str(toy_qwen), f"{VPP2} --noop-layers 0,1,4,7")
    assert json.loads(json.dumps(built)) == [[[], [2]], [[0, 1], [3]]]


def layers_built(model, flags):
    """Numbers, from 0, that the layers of this rank's chunks have in the whole model."""
    import os
    from unittest import mock

    from mindspeed_llm.testing.layouts import _environment, _plan
    from mindspeed_llm.training.setup import build, start_processes

    with mock.patch.dict(os.environ, _environment()):
        plan = _plan(model, flags, 8, 1, "posttrain")
        start_processes(plan)
    return [[layer.layer_number - 1 for layer in chunk.decoder.layers] for chunk in build(plan).chunks]
