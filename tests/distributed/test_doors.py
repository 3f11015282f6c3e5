"""The training doors under tensor, sequence, pipeline and data parallelism give the losses of one process."""

import json
import os
import pydoc_data.topics

import pytest

from mindspeed_llm.errors import UserError
from mindspeed_llm.testing.pool import pool

LAYOUTS = {
    "tensor": "--tensor-model-parallel-size 2",
    "tensor and sequence": "--tensor-model-parallel-size 2 --sequence-parallel",
    "pipeline": "--pipeline-model-parallel-size 2",
    "interleaved pipeline": "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2",
    "ring": "--context-parallel-size 2",
    "heads": "--context-parallel-size 2 --context-parallel-algo ulysses_cp_algo",
    "data": "",
    "data, distributed optimizer": "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
}
# SGD-like steps would hide nothing here: AdamW from the same weights, losses of three steps.
COMMON = "--train-iters 3 --lr 1e-3 --global-batch-size 4 --micro-batch-size 2 --seq-length 192 --eval-iters 2"
KINDS = {
    "pretrain": ("pretrain", "--split 80,20"),
    "pretrain, isolated documents": ("pretrain", "--split 80,20 --append-eod --reset-attention-mask"),
    "full": ("posttrain", "--split 80,20 --prompt-type chatml"),
    "lora": ("posttrain", "--split 80,20 --prompt-type chatml --lora-r 4 --lr-decay-style constant"),
}


def run(door, words, cache):
    """One door on this rank: training and validation losses (known on the last rank), or the refusal's text."""
    import torch.distributed as dist

    from mindspeed_llm.cli.training import run_door
    from mindspeed_llm.config.parser import parse

    here = {"WORLD_SIZE": dist.get_world_size(), "RANK": dist.get_rank(), "LOCAL_WORLD_SIZE": dist.get_world_size()}
    os.environ.update({k: str(v) for k, v in here.items()}, MINDSPEED_LLM_CACHE=cache)
    try:
        result = run_door(parse(door, [*words.split(), "--progress", "lines", "--num-threads", "1"]))
    except UserError as refused:
        return str(refused)
    return [v for _, v in result.history.train], [v for _, v in result.history.valid]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """(corpus, rows, cache directory)."""
    directory = tmp_path_factory.mktemp("data")
    topics = pydoc_data.topics.topics
    names = sorted(topics)[:40]
    rows = [
        {"instruction": f"What is {n}?", "input": "", "output": " ".join(topics[n].split()[: 4 + i])}
        for i, n in enumerate(names)
    ]
    (directory / "rows.json").write_text(json.dumps(rows))
    (directory / "text.jsonl").write_text("".join(json.dumps({"text": topics[n][:900]}) + "\n" for n in names))
    return directory / "text.jsonl", directory / "rows.json", str(directory / "cache")


def words_of(kind, model, data):
    door, flags = KINDS[kind]
    return door, f"{COMMON} {flags} --load {model} --data-path {data[0] if door == 'pretrain' else data[1]}"


@pytest.fixture(scope="module")
def one_process(toy_llama, data):
    return {kind: pool(1).run(run, *words_of(kind, toy_llama, data), data[2])[0] for kind in KINDS}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_give_the_losses_of_one(one_process, toy_llama, data, kind, layout):
    door, words = words_of(kind, toy_llama, data)
    train, valid = pool(2).run(run, door, f"{words} {LAYOUTS[layout]}", data[2])[-1]
    expected_train, expected_valid = one_process[kind]
    assert len(train) == 3
    assert train == pytest.approx(expected_train, rel=1e-5)
    assert valid == pytest.approx(expected_valid, rel=1e-5)


def test_the_comparison_notices_another_seed(one_process, toy_llama, data):
    door, words = words_of("full", toy_llama, data)
    train, _ = pool(2).run(run, door, f"{words} --seed 7", data[2])[-1]
    assert train != pytest.approx(one_process["full"][0], rel=1e-5)


@pytest.mark.parametrize("kind", ["pretrain", "lora"])
def test_a_run_on_two_processes_is_continued_by_one(one_process, toy_llama, data, tmp_path, kind):
    door, words = words_of(kind, toy_llama, data)
    layout = LAYOUTS["tensor and sequence"]
    out = tmp_path / "out"
    first, _ = pool(2).run(run, door, f"{words} {layout} --save {out} --exit-interval 2", data[2])[-1] or ([], [])
    base = f"--load {toy_llama}"
    again = (
        words.replace(base, f"--load {out}")
        if kind == "pretrain"
        else words.replace("--lora-r 4", f"--lora-load {out}")
    )
    last, _ = pool(1).run(run, door, f"{again} --save {out}", data[2])[0]
    assert first + last == pytest.approx(one_process[kind][0], rel=1e-5)


def test_a_layout_the_model_does_not_divide_by_is_refused_on_every_rank(toy_llama, data):
    door, words = words_of("full", toy_llama, data)
    for refusal in pool(2).run(run, door, f"{words} --pipeline-model-parallel-size 3", data[2]):
        assert "4 layers over 3 stages is uneven" in refusal
