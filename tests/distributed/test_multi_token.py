"""Multi-token prediction trains the same model at every layout, and its loss stands beside the model's own."""

import os
import re
from contextlib import redirect_stdout
from io import StringIO

import pytest

from mindspeed_llm.checkpoint.toy import make_toy
from mindspeed_llm.testing.layouts import assert_same, compare, make_rows, train
from mindspeed_llm.testing.pool import pool

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


def door(words, rows, saved):
    """Training through the door; (lm losses, mtp losses) by the log lines of the last rank."""
    import torch.distributed as dist

    from mindspeed_llm.cli.training import run_door
    from mindspeed_llm.config.parser import parse

    here = {"WORLD_SIZE": dist.get_world_size(), "RANK": dist.get_rank(), "LOCAL_WORLD_SIZE": dist.get_world_size()}
    os.environ.update({name: str(value) for name, value in here.items()}, MINDSPEED_LLM_CACHE=str(saved) + "-cache")
    common = f"--data-path {rows} --seq-length 64 --global-batch-size 4 --micro-batch-size 2 --lr 1e-3 --split 100,0 "
    written = StringIO()
    with redirect_stdout(written):
        run_door(parse("posttrain", f"{words} {common} {WEIGHT} --prompt-type chatml --progress lines".split()))
    found = re.findall(r"lm loss: (\S+) .*?mtp loss: (\S+) ", written.getvalue())
    return [float(main) for main, _ in found], [float(mtp) for _, mtp in found]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    import json

    file = tmp_path_factory.mktemp("data") / "rows.json"
    words = "the keys and values of a head come from one latent that all heads share".split()
    file.write_text(
        json.dumps(
            [{"instruction": " ".join(words[: 3 + i % 5]), "output": " ".join(words[i % 7 :])} for i in range(16)]
        )
    )
    return str(file)


def test_a_run_is_saved_at_one_layout_continued_at_another_and_exported(model, rows, tmp_path):
    from safetensors.torch import load_file

    from mindspeed_llm.checkpoint.convert import convert

    start = f"--load {model} --train-iters 3"
    main, predicted = pool(1).run(door, start, rows, tmp_path / "one")[0]
    assert len(main) == 3 and all(later < first for first, later in zip(predicted, predicted[1:]))
    saved = f"--save {tmp_path / 'run'} --exit-interval 2 --pipeline-model-parallel-size 2"
    begun = pool(2).run(door, f"{start} {saved}", rows, tmp_path / "two")[-1]
    again = f"--load {tmp_path / 'run'} --save {tmp_path / 'run'} --train-iters 3 {LAYOUTS['tp2 sp']}"
    ended = pool(2).run(door, again, rows, tmp_path / "two")[-1]
    assert begun[0] + ended[0] == pytest.approx(main, rel=1e-5)
    assert begun[1] + ended[1] == pytest.approx(predicted, rel=1e-5)
    exported = convert(tmp_path / "run", tmp_path / "hf", save_type="hf", quiet=True)
    assert load_file(exported / "model.safetensors").keys() == load_file(f"{model}/model.safetensors").keys()
