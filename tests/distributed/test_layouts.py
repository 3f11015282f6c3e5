"""The layout matrix: every kind of model at every layout trains as one process does, losses and all gradients.

A tick in `MATRIX` is a test. Rows have uneven lengths and unevenly many trained tokens, so that ranks have different
numbers of them; a global batch is eight rows in micro-batches of two or fewer. The parts of the library have tests of
their own for what is particular to them; here is what users combine.
"""

import functools

import pytest

from mindspeed_llm.checkpoint.toy import make_toy
from mindspeed_llm.testing.layouts import assert_same, make_rows, train
from mindspeed_llm.testing.pool import pool

EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
# Four layers each, see make_toy.
MODELS = {
    "dense": ("llama", {}),
    "tied": ("qwen2", {"tie_word_embeddings": True}),
    "experts": ("qwen3_moe", EXPERTS),
    "latent": ("deepseek_v2", {}),
    "predicting": ("deepseek_v3", {"num_nextn_predict_layers": 1}),
}
PADDED, JOINED = "--no-padding-free --micro-batch-size 2", "--micro-batch-size 2"
ONE, DOCUMENTS = make_rows(8), make_rows(8, documents=2, longest=12)
# kind -> (model, how micro-batches are made, rows)
KINDS = {
    "dense": ("dense", PADDED, ONE),
    "packed": ("dense", JOINED, DOCUMENTS),
    "tied": ("tied", JOINED, ONE),
    "experts": ("experts", JOINED, DOCUMENTS),
    "even": ("experts", "--no-padding-free --pad-to-seq-length --seq-length 24 --micro-batch-size 2", ONE),
    "latent": ("latent", JOINED, DOCUMENTS),
    "predicting": ("predicting", JOINED, DOCUMENTS),
}

SPLIT = {
    "tp": "--tensor-model-parallel-size",
    "pp": "--pipeline-model-parallel-size",
    "cp": "--context-parallel-size",
    "ep": "--expert-model-parallel-size",
    "etp": "--expert-tensor-parallel-size",
}
WORDS = {
    "sp": "--sequence-parallel",
    "zero": "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
    "vpp": "--num-layers-per-virtual-pipeline-stage 1",
    "uneven": "--num-layer-list 3,1",
    "ulysses": "--context-parallel-algo ulysses_cp_algo",
    "hybrid": "--context-parallel-algo hybrid_cp_algo --ulysses-degree-in-cp 2",
    "full": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "allgather": "--moe-token-dispatcher-type allgather",
    "grouped": "--moe-grouped-gemm",
}
# layout -> (processes, kinds)
MATRIX = {
    "tp2": (2, "dense tied"),
    "tp2 sp": (2, "dense packed tied experts latent predicting"),
    "pp2": (2, "packed experts latent predicting"),
    "pp2 vpp": (2, "dense tied experts predicting"),
    "pp2 uneven": (2, "tied latent"),
    "cp2": (2, "packed experts latent"),
    "cp2 ulysses": (2, "dense latent"),
    "zero": (2, "packed experts predicting"),
    "ep2": (2, "experts latent"),
    "cp4 hybrid": (4, "packed"),
    "tp2 cp2 sp": (4, "dense packed latent"),
    "tp2 pp2 sp": (4, "tied predicting"),
    "tp2 ep2 sp grouped": (4, "experts latent"),
    "tp2 ep2 etp1 sp": (4, "experts predicting"),
    "ep4 zero grouped": (4, "experts"),
    "tp2 ep2 sp allgather": (4, "even"),
    "tp2 pp2 sp zero full": (8, "dense packed tied"),
    "tp2 pp2 cp2 sp": (8, "packed latent"),
    "tp2 pp2 vpp ep2 sp zero": (8, "experts predicting"),
}
FAST = {("dense", "tp2"), ("packed", "cp2"), ("tied", "pp2 vpp"), ("experts", "ep2"), ("predicting", "pp2")}


def words_of(layout):
    """The command line of a layout: sizes as in "tp2", other options by name."""
    words = []
    for part in layout.split():
        name = part.rstrip("0123456789")
        words.append(WORDS[part] if part in WORDS else f"{SPLIT[name]} {part.removeprefix(name)}")
    return " ".join(words)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """model -> its Hugging Face directory."""
    root = tmp_path_factory.mktemp("models")
    return functools.cache(lambda name: str(make_toy(MODELS[name][0], root / name, **MODELS[name][1])))


@pytest.fixture(scope="module")
def alone(directory):
    """kind -> what one process gives."""

    @functools.cache
    def run(kind):
        model, batches, rows = KINDS[kind]
        return pool(1).run(train, directory(model), batches, rows)[0]

    return run


def cases():
    for layout, (processes, kinds) in MATRIX.items():
        for kind in kinds.split():
            marks = [pytest.mark.fast] if (kind, layout) in FAST else []
            yield pytest.param(kind, layout, processes, marks=marks, id=f"{kind}: {layout}")


@pytest.mark.parametrize("kind, layout, processes", cases())
def test_a_layout_trains_as_one_process(directory, alone, kind, layout, processes):
    model, batches, rows = KINDS[kind]
    found = pool(processes).run(train, directory(model), f"{batches} {words_of(layout)}", rows)[0]
    assert_same(found, alone(kind))


def test_the_matrix_has_every_kind_and_every_word():
    layouts = " ".join(MATRIX).split()
    assert {kind for _, kinds in MATRIX.values() for kind in kinds.split()} == set(KINDS)
    assert set(WORDS) <= set(layouts) and {part.rstrip("0123456789") for part in layouts} >= set(SPLIT)
    assert FAST <= {(kind, layout) for layout, (_, kinds) in MATRIX.items() for kind in kinds.split()}


@pytest.mark.parametrize(
    "kind, layout, processes, mutation",
    [
        ("experts", "tp2 sp", 2, "no sum over sequence shards"),
        ("tied", "tp2 pp2 sp", 4, "no sum over tied embeddings"),
        ("latent", "zero", 2, "loss mean per rank"),
        ("dense", "zero", 2, "no sum over data-parallel ranks"),
    ],
)
def test_the_comparison_notices(directory, alone, kind, layout, processes, mutation):
    model, batches, rows = KINDS[kind]
    words = f"{batches} {words_of(layout)}"
    with pytest.raises(AssertionError):  # copies that differ between ranks, or another training
        found = pool(processes).run(train, directory(model), words, rows, 3, "sgd", 0.1, "posttrain", mutation)[0]
        assert_same(found, alone(kind))
