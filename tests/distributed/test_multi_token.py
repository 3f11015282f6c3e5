"""Multi-token prediction trains the same model at every layout, and its loss stands beside the model's own."""

import pytest

from mindspeed_llm.checkpoint.toy import make_toy
from mindspeed_llm.testing.layouts import assert_same, compare, make_rows, train
from mindspeed_llm.testing.pool import pool

pytestmark = pytest.mark.distributed

# A large share of the gradient comes from the prediction layers.
WEIGHT = "--mtp-loss-scaling-factor 0.7"
LAYOUTS = {
    "pp2": "--pipeline-model-parallel-size 2",
    "tp2 sp": "--tensor-model-parallel-size 2 --sequence-parallel",
    "dp2 zero": "--use-distributed-optimizer",
    "cp2": "--context-parallel-size 2",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Two prediction layers, with experts, behind four dense ones."""
    directory = tmp_path_factory.mktemp("toy") / "model"
    return str(make_toy("deepseek_v3", directory, first_k_dense_replace=4, num_nextn_predict_layers=2))


def run(processes, model, flags="", rows=None, mutation=None):
    """Three small steps: rounding must not grow to another choice of experts."""
    rows = make_rows(4, documents=2) if rows is None else rows
    return pool(processes).run(train, model, f"{flags} {WEIGHT}", rows, 3, "sgd", 0.02, "posttrain", mutation)[0]


@pytest.fixture(scope="module")
def alone(model):
    return run(1, model)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_train_as_one(model, alone, layout):
    assert_same(run(2, model, LAYOUTS[layout]), alone)


def test_padded_rows_train_alike(model):
    padded = "--no-padding-free --micro-batch-size 2"
    expected = run(1, model, padded, make_rows(4))
    assert_same(run(2, model, f"{LAYOUTS['pp2']} {padded}", make_rows(4)), expected)


def test_recomputation_repeats_the_forward_pass(model, alone):
    flags = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    assert_same(run(2, model, f"{LAYOUTS['tp2 sp']} {flags}"), alone)


@pytest.mark.parametrize(
    "mutation, layout", [("prediction one off", ""), ("no sum over tied embeddings", LAYOUTS["pp2"])]
)
def test_the_comparison_notices(model, alone, mutation, layout):
    try:
        found = run(2 if layout else 1, model, layout, mutation=mutation)
    except AssertionError as noticed:
        assert "differs between ranks" in str(noticed)
    else:
        assert compare(found, alone).gradient > 1e-3
