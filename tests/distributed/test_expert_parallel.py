"""Experts spread over processes train the same model as one process, with the losses that balance them."""

import gc
import json
import os
import pydoc_data.topics
from unittest import mock

import pytest
import torch.distributed as dist

from mindspeed_llm.checkpoint.toy import make_toy
from mindspeed_llm.cli.training import run_door
from mindspeed_llm.config.parser import parse
from mindspeed_llm.models.gpt import LanguageModel
from mindspeed_llm.ops.registry import implementation
from mindspeed_llm.testing.layouts import assert_same, make_rows, train
from mindspeed_llm.testing.pool import pool
from mindspeed_llm.training.report import Reporter

SEQUENCE = "--tensor-model-parallel-size 2 --sequence-parallel"
EQUAL_ROWS = "--no-padding-free --pad-to-seq-length --seq-length 24"
LAYOUTS = {
    "experts": (2, "--expert-model-parallel-size 2"),
    "experts, grouped": (2, "--expert-model-parallel-size 2 --moe-grouped-gemm"),
    "experts, allgather": (2, f"--expert-model-parallel-size 2 --moe-token-dispatcher-type allgather {EQUAL_ROWS}"),
    "tensor, whole experts": (2, f"{SEQUENCE} --expert-tensor-parallel-size 1 --moe-grouped-gemm"),
    "tensor, experts, whole": (2, f"{SEQUENCE} --expert-model-parallel-size 2 --expert-tensor-parallel-size 1"),
    "tensor, cut experts": (2, SEQUENCE),
    "tensor, experts, cut": (4, f"{SEQUENCE} --expert-model-parallel-size 2"),
    "experts over four": (4, "--expert-model-parallel-size 4"),
    "experts, pipeline": (4, "--expert-model-parallel-size 2 --pipeline-model-parallel-size 2 --moe-grouped-gemm"),
    "experts, replicas": (4, "--expert-model-parallel-size 2 --use-distributed-optimizer --overlap-grad-reduce"),
    "experts, context": (4, "--expert-model-parallel-size 2 --context-parallel-size 2"),
}
BALANCE = (
    "--micro-batch-size 1 --moe-router-load-balancing-type aux_loss seq_aux_loss --moe-aux-loss-coeff 0.3 0.2 "
    "--moe-z-loss-coeff 0.01 "
)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Qwen2-MoE: biases, shared experts with a gate, a dense layer between those with experts."""
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, shared_expert_intermediate_size=80)
    directory = tmp_path_factory.mktemp("experts") / "qwen2_moe"
    return make_toy("qwen2_moe", directory, num_key_value_heads=4, mlp_only_layers=[1], **experts)


@pytest.fixture(scope="module")
def rows():
    return make_rows(8)


@pytest.fixture(scope="module")
def alone(toy, rows):
    return pool(1).run(train, str(toy), BALANCE, rows)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_train_as_in_one_process(toy, rows, alone, layout):
    world, flags = LAYOUTS[layout]
    assert_same(pool(world).run(train, str(toy), BALANCE + flags, rows)[0], alone)


def permuted_by_operator(*arguments):
    """`train`, and how often tokens were brought to experts and back by our operators."""
    from mindspeed_llm.ops import moe_permute

    calls = {}

    def counted(operator, function):
        def call(*inputs):
            calls[operator] = calls.get(operator, 0) + 1
            return function(*inputs)

        return call

    with mock.patch.object(moe_permute, "implementation", lambda name: counted(name, implementation(name))):
        return train(*arguments), calls


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather --no-padding-free --pad-to-seq-length --seq-length 24"])
def test_tokens_are_brought_to_experts_alike_by_operator_and_by_megatron(toy, rows, dispatcher):
    flags = f"--expert-model-parallel-size 2 --moe-token-dispatcher-type {dispatcher} {BALANCE}"
    by_megatron, none = pool(2).run(permuted_by_operator, str(toy), f"{flags} --no-moe-permute-fusion", rows, 1)[0]
    by_operator, calls = pool(2).run(permuted_by_operator, str(toy), flags, rows, 1)[0]
    assert not none and calls["moe_permute"] == calls["moe_unpermute"] > 0
    assert_same(by_operator, by_megatron)


def test_stacked_experts_are_the_experts_one_by_one(toy, rows, alone):
    assert_same(pool(1).run(train, str(toy), BALANCE + "--moe-grouped-gemm", rows)[0], alone)


@pytest.mark.parametrize("mutation", ["routing weights swapped", "expert gradients per rank", "an expert dropped"])
def test_mistakes_with_experts_are_noticed(toy, rows, alone, mutation):
    world, flags = LAYOUTS["experts"]
    arguments = (str(toy), BALANCE + flags, rows, 3, "sgd", 0.1, "posttrain", mutation)
    found = pool(world).run(train, *arguments)[0]
    with pytest.raises(AssertionError):
        assert_same(found, alone)


def run(words, cache):
    """The pre-training door on this rank: (losses known on the last rank, load-balancing losses) of the log lines."""
    here = {"WORLD_SIZE": dist.get_world_size(), "RANK": dist.get_rank(), "LOCAL_WORLD_SIZE": dist.get_world_size()}
    os.environ.update({k: str(v) for k, v in here.items()}, MINDSPEED_LLM_CACHE=cache)
    balance = []
    with mock.patch.object(Reporter, "iteration", autospec=True, side_effect=Reporter.iteration) as lines:
        result = run_door(parse("pretrain", [*words.split(), "--progress", "lines", "--num-threads", "1"]))
        balance += [call.args[1].further_losses["load_balancing_loss"] for call in lines.call_args_list]
    return [loss for _, loss in result.history.train], balance


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    topics = pydoc_data.topics.topics
    path.write_text("".join(json.dumps({"text": topics[name][:600]}) + "\n" for name in sorted(topics)[:20]))
    return path


def test_a_run_from_scratch_goes_on_with_its_experts_elsewhere(toy, corpus, tmp_path):
    """Random initial weights and a resumed state are the same for any spread of experts, stacked or not."""
    words = (
        f"--hf-config {toy} --tokenizer-name-or-path {toy} --data-path {corpus} --seq-length 48 --train-iters 4 "
        "--lr 1e-3 --global-batch-size 4 --split 1 --eval-iters 0 --moe-aux-loss-coeff 0.1 "
    )
    cache, out = str(tmp_path / "cache"), tmp_path / "out"
    expected = pool(1).run(run, words, cache)[0]
    spread = "--expert-model-parallel-size 2 --use-distributed-optimizer --moe-grouped-gemm "
    first = pool(4).run(run, f"{words} {spread} --save {out} --exit-interval 2", cache)[-1]
    again = words.replace(f"--hf-config {toy}", f"--load {out}")
    whole = f"{again} {SEQUENCE} --expert-tensor-parallel-size 1 --expert-model-parallel-size 2 --moe-grouped-gemm"
    for last in (pool(1).run(run, again, cache)[0], pool(2).run(run, whole, cache)[-1]):
        for before, after, whole_run in zip(first, last, expected):  # losses, then load-balancing losses
            assert before + after == pytest.approx(whole_run, rel=1e-5)
        assert all(value > 1.0 for value in expected[1])


def test_score_biases_follow_the_load_of_all_processes(tmp_path, rows):
    """DeepSeek's router: after each step the biases move by what all processes sent to each expert."""
    directory = str(make_toy("deepseek_v3", tmp_path / "deepseek", num_hidden_layers=2, num_mtp_layers=0))
    words = "--micro-batch-size 1 --moe-router-bias-update-rate "
    expected = pool(1).run(train, directory, words + "0.3", rows)[0]
    found = pool(2).run(train, directory, words + "0.3 --expert-model-parallel-size 2 --moe-grouped-gemm", rows)[0]
    assert_same(found, expected)
    still = pool(1).run(train, directory, words + "0", rows)[0]
    assert still.losses[0] == expected.losses[0] and abs(still.losses[2] - expected.losses[2]) > 1e-4


def test_recomputed_layers_count_their_losses_and_loads_once(toy, rows, alone):
    flags = BALANCE + "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1 "
    found = pool(2).run(train, str(toy), flags + "--expert-model-parallel-size 2", rows)[0]
    assert_same(found, alone)


def models_in_memory():
    gc.collect()
    return [thing for thing in gc.get_objects() if isinstance(thing, LanguageModel)]


def models_left(model, words, rows):
    """How many models more are in memory after one was trained and nobody refers to it any more."""
    older = models_in_memory()
    train(model, words, rows, steps=1)
    return len(models_in_memory()) - len(older)


def test_a_model_that_is_not_used_is_freed(toy, rows):
    assert pool(1).run(models_left, str(toy), BALANCE, rows) == [0]
