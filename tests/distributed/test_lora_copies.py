"""Copies of a factor on several ranks, whichever these are, are compared at every save; one that differs is named."""

import contextlib
import io
import json
import os
from unittest import mock

import pytest
import torch

from mindspeed_llm.checkpoint.toy import make_toy
from mindspeed_llm.testing.pool import pool

pytestmark = pytest.mark.distributed

EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, shared_expert_intermediate_size=80)
SEQUENCE = "--tensor-model-parallel-size 2 --sequence-parallel"
# what holds the copies -> (ranks, model, layout, factor, the rank whose copy is changed)
COPIES = {
    "tensor, of a column": (2, "dense", SEQUENCE, "linear_qkv.lora_A", 1),
    "tensor, of a row": (2, "dense", "--tensor-model-parallel-size 2", "linear_proj.lora_B.o_proj", 0),
    "context": (2, "dense", "--context-parallel-size 2", "linear_qkv.lora_B.q_proj", 1),
    "data": (2, "dense", "--use-distributed-optimizer", "linear_fc2.lora_A", 1),
    "experts, of a dense linear": (2, "experts", "--expert-model-parallel-size 2", "linear_proj.lora_A", 1),
    "experts, of replicas": (4, "experts", "--expert-model-parallel-size 2", "experts.linear_fc2.lora_B.down_proj", 2),
    "tensor in experts, first": (2, "experts", SEQUENCE, "experts.linear_fc1.lora_A", 1),
    "tensor in experts, second": (2, "experts", SEQUENCE, "experts.linear_fc2.lora_B.down_proj", 0),
    "tensor in experts, magnitudes": (2, "experts", f"{SEQUENCE} --use-dora", "fc2.lora_magnitude.down_proj", 1),
    "tensor in experts, experts": (4, "experts", f"{SEQUENCE} --expert-model-parallel-size 2", "fc1.lora_A", 3),
}


def tune(words, cache, factor, rank, unmarked=False):
    """The posttrain door on this rank: what it raised at its only save, where copies agree until one is changed.

    Args:
        unmarked: the mistake of not knowing that ranks which share an expert hold copies.
    """
    from mindspeed_llm.cli.training import run_door
    from mindspeed_llm.config.parser import parse
    from mindspeed_llm.errors import UserError
    from mindspeed_llm.training.guards.replicas import check_replicas

    def changed(plan, model, optimizer, iteration, **named):
        check_replicas(plan, model, optimizer, iteration, **named)
        parameters = [(name, p) for chunk in model.chunks for name, p in chunk.named_parameters()]
        for _, parameter in parameters:
            if unmarked:
                vars(parameter).pop("whole_in_expert", None)
        chosen = next(parameter for name, parameter in parameters if name.endswith(factor))
        if torch.distributed.get_rank() == rank:
            chosen.data.view(-1)[3] += 1e-3
        check_replicas(plan, model, optimizer, iteration, **named)

    world = str(torch.distributed.get_world_size())
    here = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "RANK": str(torch.distributed.get_rank())}
    with (
        mock.patch.dict(os.environ, here | {"MINDSPEED_LLM_CACHE": cache}),
        mock.patch("mindspeed_llm.training.guards.guards.check_replicas", changed),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        try:
            run_door(parse("posttrain", words.split()))
        except UserError as wrong:
            return str(wrong)
    return ""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("copies")
    return {
        "dense": make_toy("llama", root / "llama", num_hidden_layers=2),
        "experts": make_toy("qwen2_moe", root / "moe", num_hidden_layers=1, mlp_only_layers=[], **EXPERTS),
    }


@pytest.fixture(scope="module")
def words(models, tmp_path_factory):
    """words(model, layout, directory to save into) -> a command line."""
    rows = tmp_path_factory.mktemp("rows") / "rows.json"
    rows.write_text(json.dumps([{"instruction": "Count.", "input": "", "output": "1 2 3"}] * 4))

    def line(model, layout, save):
        return (
            f"--load {models[model]} --stage sft --prompt-type chatml --data-path {rows} --seq-length 64 --split 1 "
            "--lora-r 2 --train-iters 1 --global-batch-size 4 --micro-batch-size 1 --progress lines --num-threads 1 "
            f"--lr 1e-2 {layout} --save {save}"
        )

    return line


@pytest.mark.parametrize("holders", COPIES)
def test_a_copy_that_differs_is_named_and_nothing_is_saved(holders, words, tmp_path):
    size, model, layout, factor, rank = COPIES[holders]
    line = words(model, layout, tmp_path / "out")
    for error in pool(size).run(tune, line, str(tmp_path / "cache"), factor, rank):
        assert "replicas: copies differ after iteration 1" in error
        assert factor in error and error.count("lora_") == 1
    assert not list((tmp_path / "out").glob("iter_*"))


def test_copies_within_an_expert_are_seen_by_their_mark(words, tmp_path):
    size, model, layout, factor, rank = COPIES["tensor in experts, first"]
    line = words(model, layout, tmp_path / "out")
    assert pool(size).run(tune, line, str(tmp_path / "cache"), factor, rank, True) == [""] * size
