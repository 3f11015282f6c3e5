"""Training and generation on the simulated NPU give the CPU's losses and answers, with one process and with two."""

import json
import pydoc_data.topics

import pytest
from cases.jobs import answer, join_on_npu, peak_of_building, run

from mindspeed_llm.checkpoint.toy import make_toy
from mindspeed_llm.testing.pool import pool

COMMON = (
    "--train-iters 3 --lr 1e-3 --global-batch-size 4 --micro-batch-size 2 --seq-length 96 --split 80,20 --eval-iters 1"
)
TUNING = "--prompt-type chatml --stage sft"
JOBS = {
    "pretrain": ("pretrain", "llama", ""),
    "full": ("posttrain", "llama", TUNING),
    "packed": ("posttrain", "llama", f"{TUNING} --neat-pack"),
    "lora": ("posttrain", "llama", f"{TUNING} --lora-r 4"),
    "experts": ("pretrain", "mixtral", "--moe-grouped-gemm"),
    "experts one by one": ("posttrain", "mixtral", TUNING),
}
LAYOUTS = {
    "tensor": "--tensor-model-parallel-size 2 --sequence-parallel",
    "pipeline": "--pipeline-model-parallel-size 2",
    "ring": "--context-parallel-size 2",
    "experts": "--expert-model-parallel-size 2",
    "data": "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
    "cut": "--use-torch-fsdp2",
}
ON_ONE = ["pretrain", "packed", "lora", "experts", "experts one by one"]
ON_TWO = [
    ("full", "tensor"),
    ("full", "pipeline"),
    ("lora", "tensor"),
    ("pretrain", "ring"),
    ("pretrain", "data"),
    ("pretrain", "cut"),
    ("experts", "tensor"),
    ("experts", "experts"),
]
KERNELS = {"npu_fusion_attention", "npu_fusion_attention_grad", "npu_rms_norm", "npu_swiglu", "npu_rotary_mul"}
EXPERT_KERNELS = {"npu_moe_gating_top_k", "_npu_moe_token_unpermute_with_routing_map"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    return {
        "llama": make_toy("llama", directory / "llama"),
        "mixtral": make_toy("mixtral", directory / "mixtral", num_hidden_layers=2, num_local_experts=4),
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """(corpus, rows, cache directory)."""
    directory = tmp_path_factory.mktemp("data")
    topics = pydoc_data.topics.topics
    names = sorted(topics)[:24]
    rows = [
        {"instruction": f"What is {n}?", "input": "", "output": " ".join(topics[n].split()[: 4 + i])}
        for i, n in enumerate(names)
    ]
    (directory / "rows.json").write_text(json.dumps(rows))
    (directory / "text.jsonl").write_text("".join(json.dumps({"text": topics[n][:500]}) + "\n" for n in names))
    return directory / "text.jsonl", directory / "rows.json", str(directory / "cache")


@pytest.fixture(scope="module")
def job(models, data):
    """(door, words, cache) of a job with further words."""

    def make(name, more=""):
        door, model, flags = JOBS[name]
        source = data[0] if door == "pretrain" else data[1]
        return door, f"{COMMON} {flags} --load {models[model]} --data-path {source} {more}", data[2]

    return make


@pytest.fixture(scope="module")
def on_cpu(job):
    """Losses of a job on the CPU, each computed once."""
    known = {}

    def losses(name):
        if name not in known:
            known[name] = pool(1).run(run, *job(name), timeout=400)[0]
        return known[name]

    return losses


def agree(found, expected):
    assert (found["device"], expected["device"]) == ("npu", "cpu")
    assert len(found["train"]) == 3
    for kind in ("train", "valid"):
        assert found[kind] == pytest.approx(expected[kind], rel=1e-5)
    assert found["kernels"] >= KERNELS and not expected["kernels"]


@pytest.mark.parametrize("name", ON_ONE)
def test_one_process_gives_the_losses_of_the_cpu(job, on_cpu, name):
    found = run(*job(name))
    agree(found, on_cpu(name))
    assert ("npu_grouped_matmul" in found["kernels"]) == (name == "experts")
    assert (found["kernels"] >= EXPERT_KERNELS) == name.startswith("experts")


@pytest.mark.parametrize("name, layout", ON_TWO)
def test_two_processes_over_hccl_give_the_losses_of_the_cpu(job, on_cpu, name, layout):
    found = pool(2, join_on_npu).run(run, *job(name, LAYOUTS[layout]), timeout=400)[-1]
    agree(found, on_cpu(name))


@pytest.mark.parametrize("cut", [True, False])
def test_no_device_holds_the_whole_of_a_cut_model(models, cut):
    words = f"--load {models['llama']} --train-iters 1 --seq-length 32 --num-threads 1"
    for peak, whole in pool(2, join_on_npu).run(peak_of_building, words, cut, timeout=200):
        assert (peak < 0.9 * whole) == cut


def test_the_comparison_notices_another_seed(job, on_cpu):
    found = run(*job("pretrain", "--seed 7"))
    assert found["train"] != pytest.approx(on_cpu("pretrain")["train"], rel=1e-5)


def on_one(*arguments):
    return run(*arguments)


def on_two(*arguments):
    return pool(2, join_on_npu).run(run, *arguments, timeout=400)[-1]


@pytest.mark.parametrize("train, layout", [(on_one, ""), (on_two, LAYOUTS["tensor"])], ids=["one", "two"])
def test_a_resumed_run_goes_on_bit_by_bit(job, tmp_path, train, layout):
    door, words, cache = job("pretrain", f"--hidden-dropout 0.1 --attention-dropout 0.1 {layout}")
    words = words.replace("--train-iters 3", "--train-iters 4").replace("--eval-iters 1", "--eval-iters 0")
    whole = train(door, words, cache)
    out = tmp_path / "out"
    train(door, f"{words} --save {out} --exit-interval 2", cache)
    model = words.split("--load ")[1].split()[0]
    rest = train(door, f"{words.replace(model, str(out))} --save {out}", cache)
    assert len(rest["train"]) == 2 and rest["train"] == whole["train"][2:]


def test_a_model_answers_as_on_the_cpu(models):
    prompts = ["def f(x):\n    return", "a"]
    for model in models.values():
        assert answer(str(model), prompts) == pool(1).run(answer, str(model), prompts, timeout=400)[0]
