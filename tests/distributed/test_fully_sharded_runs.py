"""Whole runs with --use-torch-fsdp2: evaluation between steps, checkpoints, export, and what the guards say."""

import json
import os
import pydoc_data.topics
import re
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from mindspeed_llm.errors import UserError
from mindspeed_llm.testing.pool import pool

COMMON = (
    "--lr 1e-3 --lr-decay-style constant --global-batch-size 4 --seq-length 32 --split 80,20 --eval-iters 1 "
    "--num-threads 1 --progress lines --bf16"
)
FSDP2 = "--use-torch-fsdp2"


def run(words, cache):
    """The pre-training door on this rank: losses in training and of evaluations, known on the last one."""
    from mindspeed_llm.cli.training import run_door
    from mindspeed_llm.config.parser import parse

    here = {"WORLD_SIZE": dist.get_world_size(), "RANK": dist.get_rank(), "LOCAL_WORLD_SIZE": dist.get_world_size()}
    os.environ.update({k: str(v) for k, v in here.items()}, MINDSPEED_LLM_CACHE=cache)
    result = run_door(parse("pretrain", f"{COMMON} {words}".split()))
    return [loss for _, loss in result.history.train], [loss for _, loss in result.history.valid]


def gathered_after_evaluation(words, cache, careless):
    """As `run`, but how many parameters are still gathered at the end; careless: nobody lets them go."""
    from mindspeed_llm.parallel.fsdp2 import FullySharded
    from mindspeed_llm.parallel.shards import shard_of
    from mindspeed_llm.training import run as run_module

    real, built = run_module.build, []

    def build(plan):
        built.append(real(plan))
        return built[0]

    with mock.patch.object(run_module, "build", build):
        if careless:
            with mock.patch.object(FullySharded, "reshard", lambda self: None):
                run(words, cache)
        else:
            run(words, cache)
    return sum(shard_of(p) is None for p in built[0].chunks[0].parameters())


def run_with_overflow(words, cache, name):
    """As `run`, with a gradient of the weight of this module that is infinite on the last rank in every pass."""
    from mindspeed_llm.training import run as run_module

    real = run_module.build

    def build(plan):
        model = real(plan)
        part = model.chunks[0].get_submodule(name)

        def harm(module, inputs):
            if module.weight.requires_grad and torch.is_grad_enabled() and not hasattr(module.weight, "harmed"):
                module.weight.harmed = module.weight.register_hook(lambda gradient: gradient * float("inf"))

        if dist.get_rank() == dist.get_world_size() - 1:
            part.register_forward_pre_hook(harm)
        return model

    with mock.patch.object(run_module, "build", build):
        return run(words, cache)


@pytest.fixture(scope="module")
def go(toy_llama, tmp_path_factory):
    """go(ranks, flags, function): what the last rank gives for the toy on some text."""
    directory = tmp_path_factory.mktemp("text")
    topics = pydoc_data.topics.topics
    lines = [json.dumps({"text": topics[name][:400]}) + "\n" for name in sorted(topics)[:12]]
    (directory / "text.jsonl").write_text("".join(lines))

    def call(ranks, flags, function=run, *more):
        start = "" if "--load" in flags else f"--load {toy_llama}"
        words = f"{start} --data-path {directory / 'text.jsonl'} {flags}"
        return pool(ranks).run(function, words, str(directory / "cache"), *more, timeout=300)[-1]

    return call


@pytest.fixture(scope="module")
def undisturbed(go):
    """Four iterations of one process without FSDP2, evaluated after each."""
    return go(1, "--train-iters 4 --eval-interval 1")


def test_training_and_evaluation_are_those_of_one_process(go, undisturbed):
    for found, expected in zip(go(2, f"--train-iters 4 --eval-interval 1 {FSDP2}"), undisturbed, strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("careless", [False, True])
def test_an_evaluation_leaves_nothing_gathered(go, careless):
    left = go(2, f"--train-iters 1 --eval-interval 1 {FSDP2}", gathered_after_evaluation, careless)
    assert left == (2 if careless else 0)  # final norm and output layer


@pytest.fixture(scope="module")
def saved(go, tmp_path_factory):
    """{who wrote: directory} with a checkpoint after two iterations of one process and of two that are cut."""
    places = {name: tmp_path_factory.mktemp("saved") / "out" for name in ("one", "cut")}
    go(1, f"--train-iters 4 --exit-interval 2 --save {places['one']}")
    go(2, f"--train-iters 4 --exit-interval 2 --save {places['cut']} --async-save {FSDP2}")
    return places


@pytest.mark.parametrize("writer, ranks, flags", [("one", 2, FSDP2), ("cut", 1, "")])
def test_a_run_goes_on_at_another_layout(go, undisturbed, saved, writer, ranks, flags):
    losses, _ = go(ranks, f"--load {saved[writer]} --train-iters 4 {flags}")
    assert losses == pytest.approx(undisturbed[0][2:], rel=1e-4)


def test_weights_alone_are_taken_from_a_checkpoint(go, saved):
    """With --no-load-optim the fp32 values are those of the rounded weights."""
    expected, _ = go(1, f"--load {saved['one']} --train-iters 4 --no-load-optim")
    losses, _ = go(2, f"--load {saved['one']} --train-iters 4 --no-load-optim {FSDP2}")
    assert losses == pytest.approx(expected, rel=1e-4)


def test_a_hugging_face_model_is_written(go, tmp_path):
    from safetensors.torch import load_file

    for ranks, flags in ((1, ""), (2, FSDP2)):
        go(ranks, f"--train-iters 1 --save {tmp_path / str(ranks)} --save-hf {flags}")
    one, cut = (
        {k: v for file in sorted((tmp_path / n).rglob("*.safetensors")) for k, v in load_file(file).items()}
        for n in ("1", "2")
    )
    assert one.keys() == cut.keys() and len(one) > 20
    for name, tensor in one.items():
        assert torch.allclose(tensor.float(), cut[name].float(), rtol=0.02, atol=1e-3), name


def test_the_guards_look_at_shards(go):
    losses, _ = go(2, f"--train-iters 2 --check-weight-hash-across-dp-replicas-interval 1 {FSDP2}")
    again, _ = go(2, f"--train-iters 2 --replay-batch-interval 1 {FSDP2}")
    assert losses == again


@pytest.mark.parametrize("name", ["decoder.layers.2.mlp.linear_fc2", "embedding.word_embeddings"])
def test_a_weights_gradient_that_overflows_is_named_with_its_rank(go, name):
    """In a layer, and of a module that is gathered by itself."""
    with pytest.raises(UserError, match=f"rank 1 on .* gradient of the weight of {re.escape(name)}"):
        go(2, f"--train-iters 2 {FSDP2}", run_with_overflow, name)
