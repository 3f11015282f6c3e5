"""Adapters of dense linears train alike at every layout, however computed and on whichever base: three steps.

The cases are a covering set: every two values of FACTORS that go together meet in one of them.

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
from mindspeed_llm.testing.pairs import covering
from mindspeed_llm.testing.pool import pool

pytestmark = pytest.mark.distributed

BATCH = "--no-padding-free --micro-batch-size 2 --lora-r 4 --lora-alpha 12"
ROWS = make_rows(8)
# Rows and their halves are whole blocks of NF4.
SIZES = dict(hidden_size=128, intermediate_size=128, num_attention_heads=8, num_key_value_heads=4)
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
    "one": "",
    "tp2": "--tensor-model-parallel-size 2",
    "sp": "--sequence-parallel",
    "pp2": "--pipeline-model-parallel-size 2",
    "vpp": "--num-layers-per-virtual-pipeline-stage 1",
    "cp2": "--context-parallel-size 2",
    "dp2": "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
    "full": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "block": "--recompute-granularity full --recompute-method block --recompute-num-layers 1",
    "selective": "--recompute-granularity selective",
    "swap": "--swap-attention",
    "dropout": "--lora-dropout 0.25",
    "fused": "",
    "chunks": "--lora-fusion-chunks 4",
    "kernel": "",
    "coc": "--use-ascend-coc --coc-parallel-num 2",
    "combine": "--lora-fusion-combine",
    "apart": "--no-lora-fusion",
    "nf4": "--qlora",
}
FACTORS = {
    "layout": (
        "one", "tp2", "tp2 sp", "pp2", "pp2 vpp", "cp2", "dp2", "tp2 dp2 sp", "tp2 cp2 sp", "tp2 pp2 vpp sp",
    ),
    "adapters": tuple(ADAPTERS),
    "computed": ("fused", "chunks", "kernel", "coc", "combine", "apart"),
    "dropout": ("", "dropout"),
    "memory": ("", "full", "block", "selective", "swap"),
    "base": ("", "nf4"),
}  # fmt: skip


def ranks(layout):
    """Processes that a layout takes."""
    return 2 ** len({"tp2", "pp2", "cp2", "dp2"} & set(layout.split()))


def is_legal(case):
    """Chunks need something that is sent, kernels and CoC a sequence that is cut, combining the same input."""
    layout, computed = case["layout"].split(), case["computed"]
    if (computed == "chunks" and "tp2" not in layout) or (computed in ("kernel", "coc") and "sp" not in layout):
        return False
    if computed == "combine" and case["dropout"]:
        return False
    # Half of the triples with adapters, so that half as many runs of one process are needed; every pair is in them.
    crosswise = case["adapters"] in ("all", "magnitudes")
    return (bool(case["dropout"]) == bool(case["base"])) != crosswise


MATRIX = covering(FACTORS, is_legal, cost=lambda case: (1.0, 1.6, None, 3.0)[ranks(case["layout"]) - 1])
MATRIX.sort(key=lambda case: ranks(case["layout"]))  # pools that take turns make their groups anew
FAST = MATRIX[7:38:10]


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


def gather_then_multiply(x, weight, group, chunks):
    """As an NPU's kernel: AG(x) W^T and AG(x), one call."""
    whole = x.new_empty(x.shape[0] * group.size(), *x.shape[1:])
    torch.distributed.all_gather_into_tensor(whole, x.contiguous(), group=group)
    return whole @ weight.t(), whole


def multiply_then_scatter(x, weight, group, chunks):
    """Likewise RS(x W^T)."""
    y = x @ weight.t()
    out = y.new_empty(y.shape[0] // group.size(), *y.shape[1:])
    torch.distributed.reduce_scatter_tensor(out, y.contiguous(), group=group)
    return out


KERNELS = {"all_gather_matmul": gather_then_multiply, "matmul_reduce_scatter": multiply_then_scatter}


def train_here(model, flags, kernels=False, mutation=None):
    """Three steps with masks that do not depend on the layout.

    Args:
        kernels: products that send by themselves, as with --use-ascend-mc2 on an NPU.
    """
    os.environ["RANK"] = str(torch.distributed.get_rank())
    with ExitStack() as patches:
        patches.enter_context(mock.patch("mindspeed_llm.lora.layers.LoraMixin.dropped_input", mask_of_features))
        if kernels:
            patches.enter_context(mock.patch("mindspeed_llm.lora.fusion.products.implementation", KERNELS.get))
        if mutation == "A drawn per rank":
            patches.enter_context(mock.patch("mindspeed_llm.lora.inject.initial_a", drawn_per_rank))
            mutation = None
        return train(model, flags, ROWS, mutation=mutation)


def flags_of(adapters, options):
    return " ".join([BATCH, ADAPTERS[adapters], *(WORDS[word] for word in options.split())])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_toy("qwen2", tmp_path_factory.mktemp("lora") / "toy", **SIZES))


@pytest.fixture(scope="module")
def alone(model):
    """(adapters, dropout, base) -> what one process gives without recomputation, one after the other."""

    @functools.cache
    def run(adapters, dropout="", base=""):
        return pool(1).run(train_here, model, flags_of(adapters, f"{dropout} {base}"))[0]

    return run


def cases():
    for case in MATRIX:
        marks = [pytest.mark.fast] if case in FAST else []
        yield pytest.param(case, marks=marks, id=", ".join(filter(None, case.values())))


@pytest.mark.parametrize("case", cases())
def test_adapters_train_as_in_one_process(model, alone, case):
    options = " ".join(value for factor, value in case.items() if factor != "adapters")
    kernels = case["computed"] == "kernel"
    found = pool(ranks(case["layout"])).run(train_here, model, flags_of(case["adapters"], options), kernels)[0]
    expected = alone(case["adapters"], case["dropout"], case["base"])
    assert_same(found, expected)
    assert expected.gradients[0].keys() == {name for name in expected.weights if ".lora_" in name}
    silent = [name for name, gradient in expected.gradients[2].items() if not gradient.any()]
    assert not silent, silent


def test_dropout_changes_what_is_trained(alone):
    difference = compare(alone("parts", "dropout", "nf4"), alone("parts", "", "nf4"))
    assert difference.gradient > 1e-2


def test_nf4_changes_what_is_trained(alone):
    difference = compare(alone("parts", "", "nf4"), alone("parts"))
    assert difference.gradient > 1e-3


@pytest.mark.parametrize(
    "adapters, options, mutation",
    [
        ("all", "tp2 sp", "no sum over sequence shards"),
        ("magnitudes", "tp2 sp", "no sum over sequence shards"),
        ("parts", "", "no sum over data-parallel ranks"),
        ("shared", "tp2", "A drawn per rank"),
    ],
)
def test_the_comparison_notices(model, alone, adapters, options, mutation):
    try:
        found = pool(2).run(train_here, model, flags_of(adapters, options), False, mutation)[0]
    except AssertionError as differs:
        assert "differs between ranks" in str(differs) and ".lora_" in str(differs)
    else:
        assert compare(found, alone(adapters)).gradient > 1e-3


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
