"""Multi-token prediction trains the same model at every layout, and its loss stands beside the model's own."""

import pytest

from mindspeed_llm.checkpoint.toy import make_toy
from mindspeed_llm.testing.layouts import assert_same, compare, make_rows, train
from mindspeed_llm.testing.pool import pool

pytestmark = pytest.mark.distributed

# A large share of the gradient comes from the prediction layers.
WEIGHT = "--mtp-loss-scaling-factor 0.7"
PACKED = dict(documents=2)
LAYOUTS = {
    "pp2": "--pipeline-model-parallel-size 2",
    "tp2 sp": "--tensor-model-parallel-size 2 --sequence-parallel",
    "dp2 zero": "--use-distributed-optimizer",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Two prediction layers behind four dense ones."""
    directory = tmp_path_factory.mktemp("toy") / "model"
    return str(make_toy("deepseek_v3", directory, first_k_dense_replace=4, num_nextn_predict_layers=2))


@pytest.fixture(scope="module")
def alone(model):
    return pool(1).run(train, model, WEIGHT, make_rows(4, **PACKED))[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_train_as_one(model, alone, layout):
    found = pool(2).run(train, model, f"{LAYOUTS[layout]} {WEIGHT}", make_rows(4, **PACKED))[0]
    assert_same(found, alone)


def test_padded_rows_train_alike(model, alone):
    rows = make_rows(4)
    expected = pool(1).run(train, model, WEIGHT, rows)[0]
    flags = f"{LAYOUTS['pp2']} {WEIGHT} --no-padding-free --micro-batch-size 2"
    assert_same(pool(2).run(train, model, flags, rows)[0], expected)


def test_recomputation_repeats_the_forward_pass(model, alone):
    flags = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    found = pool(2).run(train, model, f"{LAYOUTS['tp2 sp']} {WEIGHT} {flags}", make_rows(4, **PACKED))[0]
    assert_same(found, alone)


@pytest.mark.parametrize(
    "mutation, layout", [("prediction one off", ""), ("no sum over tied embeddings", LAYOUTS["pp2"])]
)
def test_the_comparison_notices(model, alone, mutation, layout):
    arguments = (model, f"{layout} {WEIGHT}", make_rows(4, **PACKED), 3, "sgd", 0.1, "posttrain", mutation)
    try:
        found = pool(2 if layout else 1).run(train, *arguments)[0]
    except AssertionError as noticed:
        assert "differs between ranks" in str(noticed)
    else:
        assert compare(found, alone).gradient > 1e-3
