"""Multi-head latent attention trains the same model at every layout as on one process."""

import pytest

from mindspeed_llm.checkpoint.toy import make_toy
from mindspeed_llm.testing.layouts import assert_same, make_rows, train
from mindspeed_llm.testing.pool import pool

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
        "mscale": 1.0, "mscale_all_dim": 0.7}  # fmt: skip
MODELS = {
    # all layers dense: attention alone differs from the other families
    "latent": ("deepseek_v3", {"first_k_dense_replace": 4, "rope_parameters": YARN}),
    "no query latent": ("deepseek_v2", {"first_k_dense_replace": 4, "q_lora_rank": None}),
}
TP2 = "--tensor-model-parallel-size 2"
LAYOUTS = {
    "tp2": TP2,
    "tp2 sp": TP2 + " --sequence-parallel",
    "pp2": "--pipeline-model-parallel-size 2",
    "dp2 zero": "--use-distributed-optimizer",
    "cp2": "--context-parallel-size 2",
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    made = {}
    for name, (model_type, fields) in MODELS.items():
        made[name] = str(make_toy(model_type, tmp_path_factory.mktemp("toy") / "model", **fields))
    return made


@pytest.fixture(scope="module")
def alone(directories):
    rows = make_rows(4, documents=2)
    return {name: pool(1).run(train, directory, "", rows)[0] for name, directory in directories.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_train_as_one(directories, alone, layout):
    found = pool(2).run(train, directories["latent"], LAYOUTS[layout], make_rows(4, documents=2))[0]
    assert_same(found, alone["latent"])


def test_queries_without_a_latent_train_alike(directories, alone):
    found = pool(2).run(train, directories["no query latent"], LAYOUTS["tp2 sp"], make_rows(4, documents=2))[0]
    assert_same(found, alone["no query latent"])


def test_recomputation_repeats_the_forward_pass(directories, alone):
    flags = LAYOUTS["tp2 sp"] + " --recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    found = pool(2).run(train, directories["latent"], flags, make_rows(4, documents=2))[0]
    assert_same(found, alone["latent"])


def test_the_comparison_notices_down_projections_that_are_not_summed(directories, alone):
    with pytest.raises(AssertionError, match="differs between ranks"):
        pool(2).run(
            train,
            directories["latent"],
            LAYOUTS["tp2 sp"],
            make_rows(4, documents=2),
            3,
            "sgd",
            0.1,
            "posttrain",
            "no sum over sequence shards",
        )


@pytest.mark.parametrize("mutation", ["rotary not interleaved", "scores without mscale"])
def test_the_comparison_notices_another_function(directories, alone, mutation):
    found = pool(1).run(
        train, directories["latent"], "", make_rows(4, documents=2), 1, "sgd", 0.1, "posttrain", mutation
    )[0]
    assert abs(found.losses[0] / alone["latent"].losses[0] - 1) > 1e-4
