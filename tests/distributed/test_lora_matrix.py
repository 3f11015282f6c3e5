"""Adapters of dense linears train alike at every layout, with dropout and recomputation: gradients and three steps.

Three steps, since B is zero at first and A has no gradient then. Dropout is compared with masks that are the same at
every layout: which inputs of a linear are dropped depends on its name alone.
"""

import functools
import hashlib
import os
from contextlib import ExitStack, nullcontext
from unittest import mock

import pytest
import torch

from mindspeed_llm.checkpoint.toy import make_toy
from mindspeed_llm.testing.layouts import assert_same, compare, make_rows, train
from mindspeed_llm.testing.pool import pool

pytestmark = pytest.mark.distributed

BATCH = "--no-padding-free --micro-batch-size 2 --lora-r 4 --lora-alpha 12"
ROWS = make_rows(8)
# what is adapted, and how -> flags
ADAPTERS = {
    "parts": "--lora-target-modules q_proj v_proj",
    "all": "--lora-target-modules all-linear --use-rslora",
    "shared": "--lora-target-modules linear_qkv",
    "magnitudes": "--lora-target-modules q_proj v_proj o_proj linear_fc1 down_proj --use-dora",
    "patterns": "--lora-target-modules wq wv wo w1 w2 --lora-layers-to-transform 1 2 --lora-rank-pattern wv=2 wo=6 "
    "--lora-alpha-pattern w2=3",
}
WORDS = {
    "tp2": "--tensor-model-parallel-size 2",
    "sp": "--sequence-parallel",
    "pp2": "--pipeline-model-parallel-size 2",
    "vpp": "--num-layers-per-virtual-pipeline-stage 1",
    "cp2": "--context-parallel-size 2",
    "dp2": "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
    "replicas": "",
    "full": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "selective": "--recompute-granularity selective",
    "dropout": "--lora-dropout 0.25",
    "apart": "--no-lora-fusion",
}
# (adapters, layout and what else is on); every pair of layout and adapters, dropout and recomputation occurs somewhere
MATRIX = [
    (1, "parts", "full"),
    (1, "all", "selective dropout"),
    (1, "magnitudes", "full dropout"),
    (2, "parts", "tp2 full dropout"),
    (2, "magnitudes", "tp2"),
    (2, "all", "tp2 sp"),
    (2, "shared", "tp2 sp selective dropout"),
    (2, "magnitudes", "tp2 sp full dropout"),
    (2, "patterns", "tp2 sp"),
    (2, "magnitudes", "tp2 sp apart"),
    (2, "parts", "pp2 selective"),
    (2, "patterns", "pp2 full dropout"),
    (2, "all", "pp2 vpp dropout"),
    (2, "magnitudes", "pp2 vpp full"),
    (2, "shared", "cp2 full"),
    (2, "all", "cp2 dropout"),
    (2, "all", "dp2 selective"),
    (2, "parts", "dp2 dropout"),
    (2, "magnitudes", "dp2 full"),
    (4, "all", "tp2 pp2 sp dropout"),
    (4, "parts", "tp2 cp2 sp"),
]
FAST = ("parts", "tp2 full dropout"), ("all", "tp2 sp"), ("magnitudes", "pp2 vpp full")


def mask_of_features(module, x):
    """x with some inputs of the linear dropped for every token: the same ones whatever the layout."""
    if module.dropout == 0.0 or not module.training:
        return None
    kind, width = module.kind, x.shape[-1] * (1 if module.kind.column else module.kind.world)
    seed = int(hashlib.sha256(f"{sorted(module.part_rows)}/{width}".encode()).hexdigest()[:8], 16)
    kept = (torch.rand(width, generator=torch.Generator().manual_seed(seed)) >= module.dropout).to(x.dtype)
    kept = kept if kind.column else kept.chunk(kind.world)[kind.group.rank()]
    return x * kept / (1 - module.dropout)


def drawn_per_rank(name, ranks, in_features, seed):
    """A drawn by every rank for itself: a mistake."""
    from mindspeed_llm.lora.initial import initial_a

    return initial_a(name, ranks, in_features, seed + 7 * int(os.environ["RANK"]))


def train_here(model, flags, mutation=None):
    """Three steps with masks that do not depend on the layout."""
    os.environ["RANK"] = str(torch.distributed.get_rank())
    with ExitStack() as patches:
        patches.enter_context(mock.patch("mindspeed_llm.lora.layers.LoraMixin.dropped_input", mask_of_features))
        if mutation == "A drawn per rank":
            patches.enter_context(mock.patch("mindspeed_llm.lora.inject.initial_a", drawn_per_rank))
            mutation = None
        return train(model, flags, ROWS, mutation=mutation)


def flags_of(adapters, options):
    return " ".join([BATCH, ADAPTERS[adapters], *(WORDS[word] for word in options.split())])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_toy("qwen2", tmp_path_factory.mktemp("lora") / "toy"))


@pytest.fixture(scope="module")
def alone(model):
    """(adapters, whether there is dropout) -> what one process gives without recomputation."""

    @functools.cache
    def run(adapters, dropout):
        return pool(1).run(train_here, model, flags_of(adapters, "dropout" if dropout else ""))[0]

    return run


def cases():
    for size, adapters, options in MATRIX:
        marks = [pytest.mark.fast] if (adapters, options) in FAST else []
        yield pytest.param(size, adapters, options, marks=marks, id=f"{adapters}: {options}")


@pytest.mark.parametrize("size, adapters, options", cases())
def test_adapters_train_as_in_one_process(model, alone, size, adapters, options):
    found = pool(size).run(train_here, model, flags_of(adapters, options))[0]
    expected = alone(adapters, "dropout" in options)
    assert_same(found, expected)
    assert expected.gradients[0].keys() == {name for name in expected.weights if ".lora_" in name}
    silent = [name for name, gradient in expected.gradients[2].items() if not gradient.any()]
    assert not silent, silent


def test_dropout_changes_what_is_trained(alone):
    difference = compare(alone("parts", True), alone("parts", False))
    assert difference.gradient > 1e-2


@pytest.mark.parametrize(
    "adapters, options, mutation",
    [
        ("all", "tp2 sp", "no sum over sequence shards"),
        ("magnitudes", "tp2 sp", "no sum over sequence shards"),
        ("parts", "replicas", "no sum over data-parallel ranks"),
        ("shared", "tp2", "A drawn per rank"),
    ],
)
def test_the_comparison_notices(model, alone, adapters, options, mutation):
    try:
        found = pool(2).run(train_here, model, flags_of(adapters, options), mutation)[0]
    except AssertionError as differs:
        assert "differs between ranks" in str(differs) and ".lora_" in str(differs)
    else:
        assert compare(found, alone(adapters, False)).gradient > 1e-3


def tune_here(words, cache, mutation):
    """The posttrain door on this rank: what it raised."""
    from mindspeed_llm.cli.training import run_door
    from mindspeed_llm.config.parser import parse
    from mindspeed_llm.errors import UserError
    from mindspeed_llm.testing.mutations import MUTATIONS

    environment = {"WORLD_SIZE": "2", "RANK": str(torch.distributed.get_rank()), "MINDSPEED_LLM_CACHE": cache}
    with mock.patch.dict(os.environ, environment), MUTATIONS[mutation]() if mutation else nullcontext():
        try:
            run_door(parse("posttrain", words.split()))
        except UserError as wrong:
            return str(wrong)
    return ""


def test_factors_that_drifted_apart_are_named_before_they_are_saved(model, tmp_path):
    rows = tmp_path / "rows.json"
    rows.write_text('[{"instruction": "Count.", "input": "", "output": "1 2 3"}, {"instruction": "a", "output": "b"}]')
    words = (
        f"--load {model} --stage sft --prompt-type chatml --data-path {rows} --seq-length 64 --split 1 --lora-r 2 "
        "--train-iters 2 --global-batch-size 2 --progress lines --num-threads 1 --lr 1e-2 --save-interval 2 "
        "--tensor-model-parallel-size 2 --sequence-parallel"
    )
    cache = str(tmp_path / "cache")
    assert pool(2).run(tune_here, f"{words} --save {tmp_path / 'calm'}", cache, None) == ["", ""]
    found = pool(2).run(tune_here, f"{words} --save {tmp_path / 'drift'}", cache, "no sum over sequence shards")
    for error in found:
        assert "replicas: copies differ after iteration 2" in error
        assert "linear_proj.lora_B.o_proj" in error or "linear_qkv.lora_A" in error
    assert not list((tmp_path / "drift").glob("iter_*"))
