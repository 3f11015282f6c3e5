"""Adapters of experts, routers and latent attention are trained alike by every layout, and by one process."""

from types import SimpleNamespace
from unittest import mock

import pytest

from mindspeed_llm.checkpoint.toy import make_toy
from mindspeed_llm.testing.layouts import _Recorder as Recorder
from mindspeed_llm.testing.layouts import assert_same, make_rows, train
from mindspeed_llm.testing.mutations import MUTATIONS
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
VOCABULARY = "--micro-batch-size 1 --lora-r 4 --lora-alpha 12 --lora-target-modules embed_tokens lm_head q_proj "
LATENT_LAYOUTS = {
    "tensor": (2, SEQUENCE),
    "pipeline": (2, "--pipeline-model-parallel-size 2"),
    "context": (2, "--context-parallel-size 2"),
    "replicas": (2, "--use-distributed-optimizer --overlap-grad-reduce"),
    "recomputed": (2, f"{SEQUENCE} --recompute-granularity full --recompute-method uniform --recompute-num-layers 1"),
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


MAGNITUDES = LORA + "--use-dora --weight-decay 0.1 "
MAGNITUDE_LAYOUTS = {
    "tensor, experts, cut, grouped": f"{SEQUENCE} --expert-model-parallel-size 2 --moe-grouped-gemm",
    "tensor, cut experts, recomputed": f"{SEQUENCE} --recompute-granularity full --recompute-method uniform "
    "--recompute-num-layers 1",
}


@pytest.fixture(scope="module")
def magnitudes_alone(experts, rows):
    return pool(1).run(train, experts, MAGNITUDES, rows)[0]


@pytest.mark.parametrize("layout", MAGNITUDE_LAYOUTS)
def test_magnitudes_of_experts_train_as_in_one_process(layout, experts, rows, magnitudes_alone):
    trained = [n for n, g in magnitudes_alone.gradients[0].items() if "local_experts" in n and "magnitude" in n]
    assert len(trained) == 3 * 4 * 3  # of gate, up and down of four experts in three of the layers
    world = 4 if "expert-model" in MAGNITUDE_LAYOUTS[layout] else 2
    assert_same(pool(world).run(train, experts, MAGNITUDES + MAGNITUDE_LAYOUTS[layout], rows)[0], magnitudes_alone)


@pytest.mark.parametrize("mistake", ["adapters of cut experts not summed", "norms of a rank's own columns"])
def test_wrong_magnitudes_of_experts_are_noticed(mistake, experts, rows, magnitudes_alone):
    flags = MAGNITUDES + SEQUENCE
    with pytest.raises(AssertionError):
        assert_same(pool(2).run(train_magnitudes_wrongly, mistake, experts, flags, rows)[0], magnitudes_alone)


def train_magnitudes_wrongly(mistake, model, flags, rows):
    """With a sum over the ranks of an expert left out."""
    if mistake in MUTATIONS:
        return train(model, flags, rows, mutation=mistake)
    with mock.patch("mindspeed_llm.lora.experts.dist", SimpleNamespace(all_reduce=lambda tensor, group: None)):
        return train(model, flags, rows)


@pytest.fixture(scope="module")
def latent(tmp_path_factory):
    """DeepSeek-V3: latent attention, a dense layer, experts behind it, and a multi-token prediction layer."""
    directory = tmp_path_factory.mktemp("lora") / "deepseek_v3"
    fields = dict(num_hidden_layers=2, num_nextn_predict_layers=1, n_routed_experts=4, n_group=2, topk_group=2)
    return str(make_toy("deepseek_v3", directory, **fields))


@pytest.fixture(scope="module")
def latent_alone(latent, rows):
    return pool(1).run(train, latent, LORA, rows)[0]


@pytest.mark.parametrize("layout", LATENT_LAYOUTS)
def test_adapters_of_latent_attention_and_prediction_train_as_in_one_process(layout, latent, rows, latent_alone):
    adapted = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in latent_alone.gradients[0]}
    assert {"linear_q_down_proj", "linear_q_up_proj", "linear_kv_down_proj", "linear_kv_up_proj", "eh_proj"} <= adapted
    world, flags = LATENT_LAYOUTS[layout]
    assert_same(pool(world).run(train, latent, LORA + flags, rows)[0], latent_alone)


def test_down_projections_train_alike_without_sequence_shards(rows, tmp_path):
    fields = dict(num_hidden_layers=2, first_k_dense_replace=2)
    dense = str(make_toy("deepseek_v3", tmp_path / "dense", **fields))
    words = LORA.replace("all-router", "")
    found = pool(2).run(train, dense, words + "--tensor-model-parallel-size 2", rows)[0]
    assert_same(found, pool(1).run(train, dense, words, rows)[0])


VOCABULARY_LAYOUTS = {
    "tensor": "--tensor-model-parallel-size 2",
    "tensor, sequence": SEQUENCE,
    "pipeline": "--pipeline-model-parallel-size 2",
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return str(make_toy("llama", tmp_path_factory.mktemp("lora") / "llama", num_hidden_layers=2))


@pytest.fixture(scope="module")
def vocabulary_alone(dense, rows):
    return {
        magnitudes: pool(1).run(train, dense, VOCABULARY + magnitudes, rows)[0] for magnitudes in ("", "--use-dora ")
    }


@pytest.mark.parametrize("magnitudes", ["", "--use-dora "])
@pytest.mark.parametrize("layout", VOCABULARY_LAYOUTS)
def test_adapters_of_embedding_and_output_layer_train_as_in_one_process(
    layout, magnitudes, dense, rows, vocabulary_alone
):
    alone = vocabulary_alone[magnitudes]
    names = {name.split(".lora_")[0] for name in alone.gradients[0] if not magnitudes or "magnitude" in name}
    assert {"embedding.word_embeddings", "output_layer"} <= names
    found = pool(2).run(train, dense, VOCABULARY + magnitudes + VOCABULARY_LAYOUTS[layout], rows)[0]
    assert_same(found, alone)


def test_a_norm_over_a_ranks_own_tokens_is_noticed(dense, rows, vocabulary_alone):
    flags = f"{VOCABULARY} --use-dora {VOCABULARY_LAYOUTS['tensor']}"
    with pytest.raises(AssertionError):
        assert_same(pool(2).run(train_with_own_norms, dense, flags, rows)[0], vocabulary_alone["--use-dora "])


def train_with_own_norms(*arguments):
    """The mistake of not adding up what ranks have of the embedding's outputs."""
    with mock.patch("mindspeed_llm.lora.vocabulary.dist", SimpleNamespace(all_reduce=lambda tensor, group: None)):
        return train(*arguments)


MISTAKES = {
    "no sum over sequence shards": "tensor, experts, whole",
    "adapters of cut experts not summed": "tensor, cut experts",
    "no sum over data-parallel ranks": "experts",
}


@pytest.mark.parametrize("mutation", MISTAKES)
def test_a_gradient_sum_that_is_left_out_is_noticed(mutation, experts, rows, alone):
    world, flags = EXPERT_LAYOUTS[MISTAKES[mutation]]
    with pytest.raises(AssertionError):
        found = pool(world).run(train, experts, LORA + flags, rows, 3, "sgd", 0.1, "posttrain", mutation)[0]
        assert_same(found, alone)


def gradient_norms(*arguments):
    """The norms that gradients are clipped by, of every step."""
    norms = []

    def get_grad_norm(recorder):
        norms.append(recorder.inner.get_grad_norm())
        return norms[-1]

    with mock.patch.object(Recorder, "get_grad_norm", get_grad_norm):
        train(*arguments)
    return norms


@pytest.mark.parametrize("layout", ["tensor, experts, cut, grouped", "tensor, experts, whole", "experts, replicas"])
def test_every_factor_counts_once_in_the_gradient_norm(layout, experts, rows):
    words = MAGNITUDES + "--lr 1e-6 "
    expected = pool(1).run(gradient_norms, experts, words, rows, 2, "adamw")[0]
    world, flags = EXPERT_LAYOUTS[layout]
    for found in pool(world).run(gradient_norms, experts, words + flags, rows, 2, "adamw"):
        assert found == pytest.approx(expected, rel=1e-5)
