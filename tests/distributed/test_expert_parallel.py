"""Experts spread over processes train the same model as one process, with the losses that balance them."""

import pytest

from mindspeed_llm.checkpoint.toy import make_toy
from mindspeed_llm.testing.layouts import assert_same, make_rows, train
from mindspeed_llm.testing.pool import pool

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


def test_stacked_experts_are_the_experts_one_by_one(toy, rows, alone):
    assert_same(pool(1).run(train, str(toy), BALANCE + "--moe-grouped-gemm", rows)[0], alone)


@pytest.mark.parametrize("mutation", ["routing weights swapped", "expert gradients per rank", "an expert dropped"])
def test_mistakes_with_experts_are_noticed(toy, rows, alone, mutation):
    world, flags = LAYOUTS["experts"]
    arguments = (str(toy), BALANCE + flags, rows, 3, "sgd", 0.1, "posttrain", mutation)
    found = pool(world).run(train, *arguments)[0]
    with pytest.raises(AssertionError):
        assert_same(found, alone)
