"""Adapters of experts, routers and latent attention are trained alike by every layout, and by one process."""

import pytest

from mindspeed_llm.checkpoint.toy import make_toy
from mindspeed_llm.testing.layouts import assert_same, make_rows, train
from mindspeed_llm.testing.pool import pool

SEQUENCE = "--tensor-model-parallel-size 2 --sequence-parallel"
LORA = "--micro-batch-size 1 --lora-r 4 --lora-alpha 12 --lora-target-modules all-linear all-router "
EXPERT_LAYOUTS = {
    "experts": (2, "--expert-model-parallel-size 2"),
    "experts, grouped": (2, "--expert-model-parallel-size 2 --moe-grouped-gemm"),
    "tensor, cut experts": (2, SEQUENCE),
    "tensor, experts, whole": (2, f"{SEQUENCE} --expert-model-parallel-size 2 --expert-tensor-parallel-size 1"),
    "tensor, experts, cut, grouped": (4, f"{SEQUENCE} --expert-model-parallel-size 2 --moe-grouped-gemm"),
    "experts, pipeline": (4, "--expert-model-parallel-size 2 --pipeline-model-parallel-size 2"),
    "experts, context": (4, "--expert-model-parallel-size 2 --context-parallel-size 2"),
    "experts, replicas": (4, "--expert-model-parallel-size 2 --use-distributed-optimizer --moe-grouped-gemm"),
}


@pytest.fixture(scope="module")
def rows():
    return make_rows(8)


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """Qwen2-MoE: biases, shared experts with a gate, a dense layer between those with experts."""
    sizes = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, shared_expert_intermediate_size=80)
    directory = tmp_path_factory.mktemp("lora") / "qwen2_moe"
    return str(make_toy("qwen2_moe", directory, num_key_value_heads=4, mlp_only_layers=[1], **sizes))


@pytest.fixture(scope="module")
def alone(experts, rows):
    return pool(1).run(train, experts, LORA, rows)[0]


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS)
def test_adapters_of_experts_train_as_in_one_process(layout, experts, rows, alone):
    world, flags = EXPERT_LAYOUTS[layout]
    found = pool(world).run(train, experts, LORA + flags, rows)[0]
    assert_same(found, alone)
