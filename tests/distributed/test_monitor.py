"""What a run measures of itself is the same at every layout, changes no loss, and names the rank that is slow."""

import json
import os
import pydoc_data.topics
import socket
import time
from unittest import mock

import pytest
import torch.distributed as dist

from mindspeed_llm.checkpoint.toy import make_toy
from mindspeed_llm.testing.pool import pool
from mindspeed_llm.training.monitor.jsonl import read_lines

COMMON = (
    "--lr 1e-3 --global-batch-size 4 --micro-batch-size 2 --seq-length 64 --split 100 --eval-iters 0 "
    "--num-threads 1 --progress lines "
)
MEASURED = "--log-params-norm --log-num-zeros-in-grad --log-layer-norms --log-expert-load --log-max-attention-logit "
LAYOUTS = {
    "tensor and sequence": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pipeline": (2, "--pipeline-model-parallel-size 2"),
    "interleaved pipeline": (2, "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"),
    "experts": (2, "--expert-model-parallel-size 2 --moe-grouped-gemm"),
    "distributed optimizer": (2, "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"),
    "fully sharded": (2, "--use-torch-fsdp2"),
    "experts, tensor, replicas": (
        4,
        "--expert-model-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer",
    ),
    "recomputed": (1, "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"),
}


def environment(cache):
    here = {"WORLD_SIZE": dist.get_world_size(), "RANK": dist.get_rank(), "LOCAL_WORLD_SIZE": dist.get_world_size()}
    os.environ.update({k: str(v) for k, v in here.items()}, MINDSPEED_LLM_CACHE=cache)


def run(words, cache):
    """The pre-training door on this rank: the losses, known on the last one."""
    from mindspeed_llm.cli.training import run_door
    from mindspeed_llm.config.parser import parse

    environment(cache)
    result = run_door(parse("pretrain", (COMMON + words).split()))
    return [loss for _, loss in result.history.train]


def run_with_slow_rank(words, cache, slow, seconds):
    """As `run`, with a rank whose own computation of every batch takes longer."""
    from mindspeed_llm.training import step

    original = step.forward_step

    def forward_step(batches, model):
        if dist.get_rank() == slow:
            time.sleep(seconds)
        return original(batches, model)

    with mock.patch.object(step, "forward_step", forward_step):
        return run(words, cache)


def run_with_copies_counted(words, cache):
    """As `run`, counting every tensor-parallel copy as if it were a part of its own."""
    with mock.patch("mindspeed_llm.training.monitor.norms.is_counted", lambda parameter: True):
        return run(words, cache)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """(model with experts, dense model, corpus, cache)."""
    root = tmp_path_factory.mktemp("monitored")
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, shared_expert_intermediate_size=80)
    make_toy("qwen2_moe", root / "experts", num_key_value_heads=4, mlp_only_layers=[1], **experts)
    make_toy("llama", root / "dense")
    topics = pydoc_data.topics.topics
    lines = "".join(json.dumps({"text": topics[name][:900]}) + "\n" for name in sorted(topics)[:30])
    (root / "text.jsonl").write_text(lines)
    return root


def measured(places, file, world, flags, model="experts", function=run, *arguments):
    """(losses, metrics lines, expert lines, warnings) of a run."""
    length = "" if "--train-iters" in flags else "--train-iters 2 "
    words = f"{length}--load {places / model} --data-path {places / 'text.jsonl'} --metrics-jsonl {file} {flags}"
    losses = pool(world).run(function, words, str(places / "cache"), *arguments, timeout=400)[-1]
    lines = list(read_lines(file))
    return losses, *([x for x in lines if x["kind"] == kind] for kind in ("metrics", "experts", "warning"))


@pytest.fixture(scope="module")
def alone(places, tmp_path_factory):
    return measured(places, tmp_path_factory.mktemp("alone") / "metrics.jsonl", 1, MEASURED)


def figures(lines, but=()):
    """What is compared between layouts: of every iteration, all but times and memory."""
    kept = ("lm loss", "grad-norm", "params-norm", "num-zeros", "expert-load", "max_attention_logit")
    return [{k: v for k, v in line.items() if k.startswith(kept) and k not in but} for line in lines]


def assert_close(found, expected):
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


def test_nothing_measured_changes_a_loss(places, alone, tmp_path):
    plain, lines, experts, _ = measured(places, tmp_path / "metrics.jsonl", 1, "")
    everything = "--log-local-norms --log-timing --log-memory --straggler-threshold 50 --straggler-window 1"
    watched, *_ = measured(places, tmp_path / "all.jsonl", 1, f"{MEASURED} {everything}")
    assert plain == alone[0] == watched
    assert not experts
    assert not {"params-norm", "num-zeros", "expert-load", "max_attention_logit"} & set(lines[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_figures_are_those_of_one_process(places, alone, tmp_path, layout):
    world, flags = LAYOUTS[layout]
    losses, lines, experts, _ = measured(places, tmp_path / "metrics.jsonl", world, MEASURED + flags)
    # A vocabulary that is padded for tensor parallelism has more rows without a gradient.
    but = ("num-zeros",) if "tensor-model" in flags else ()
    assert losses == pytest.approx(alone[0], rel=1e-5)
    assert_close(figures(lines, but), figures(alone[1], but))
    assert [line["tokens"] for line in experts] == [line["tokens"] for line in alone[2]]


def test_adapters_have_norms_too(places, tmp_path):
    flags = "--log-layer-norms --lora-r 4"
    _, alone, *_ = measured(places, tmp_path / "one.jsonl", 1, flags, "dense")
    _, cut, *_ = measured(places, tmp_path / "two.jsonl", 2, f"{flags} --tensor-model-parallel-size 2", "dense")
    assert_close(figures(cut), figures(alone))
    assert alone[0]["grad-norm/embedding"] == 0.0 < alone[0]["grad-norm/layer-1"]


def test_the_figures_agree_with_each_other(places, alone):
    for line, experts in zip(alone[1], alone[2], strict=True):
        parts = [value**2 for name, value in line.items() if name.startswith("grad-norm/")]
        assert sum(parts) ** 0.5 == pytest.approx(line["grad-norm"], rel=1e-5)
        weights = [value**2 for name, value in line.items() if name.startswith("params-norm/")]
        assert sum(weights) ** 0.5 == pytest.approx(line["params-norm"], rel=1e-6)
        # 4 samples of 64 tokens, each to 2 experts, in the three layers that have them
        assert list(experts["tokens"]) == ["layer-1", "layer-3", "layer-4"]
        assert {sum(row) for row in experts["tokens"].values()} == {4 * 64 * 2}
        assert line["expert-load/layer-3"] == pytest.approx(max(experts["tokens"]["layer-3"]) / (4 * 64 * 2 / 4))
        assert line["max_attention_logit"] == max(line[f"max_attention_logit/layer-{n}"] for n in (1, 2, 3, 4))


def test_copies_counted_twice_would_be_noticed(places, alone, tmp_path):
    world, flags = LAYOUTS["tensor and sequence"]
    flags = f"{MEASURED} {flags}"
    _, lines, *_ = measured(places, tmp_path / "metrics.jsonl", world, flags, "experts", run_with_copies_counted)
    with pytest.raises(AssertionError):
        assert_close(figures(lines, ("num-zeros",)), figures(alone[1], ("num-zeros",)))


def test_local_losses_are_those_of_the_replicas_rows(places, tmp_path):
    """--log-local-norms: one process has the loss and the norm; the mean of two replicas' losses is the loss."""
    flags = "--log-local-norms"
    _, whole, *_ = measured(places, tmp_path / "one.jsonl", 1, flags, "dense")
    _, halves, *_ = measured(places, tmp_path / "two.jsonl", 2, flags, "dense")
    _, stages, *_ = measured(places, tmp_path / "pp.jsonl", 2, f"{flags} --pipeline-model-parallel-size 2", "dense")
    for one, two, pp in zip(whole, halves, stages, strict=True):
        assert one["local-loss/replica-0"] == pytest.approx(one["lm loss"], rel=1e-6)
        assert one["local-grad-norm/rank-0"] == pytest.approx(one["grad-norm"], rel=1e-5)
        mine, other = two["local-loss/replica-0"], two["local-loss/replica-1"]
        assert mine != other
        assert (mine + other) / 2 == pytest.approx(two["lm loss"], rel=1e-6)
        # Gradients of different rows are not parallel: their mean is shorter than the mean of their lengths.
        lengths = [two[f"local-grad-norm/rank-{rank}"] for rank in (0, 1)]
        assert sum(lengths) / 2 > 1.001 * two["grad-norm"]
        assert pp["local-loss/replica-0"] == pytest.approx(pp["lm loss"], rel=1e-5)
        parts = [pp[f"local-grad-norm/rank-{rank}"] ** 2 for rank in (0, 1)]
        assert sum(parts) ** 0.5 == pytest.approx(pp["grad-norm"], rel=1e-5)


@pytest.mark.parametrize("slow", [None, 1])
def test_a_slow_rank_is_named(places, tmp_path, slow):
    """--straggler-threshold, --straggler-window and --log-timing; equal ranks are not named."""
    flags = "--log-timing --straggler-threshold 3 --straggler-window 2 --log-interval 1 --train-iters 5"
    arguments = ("dense", run_with_slow_rank, slow, 1.0)
    _, lines, _, warnings = measured(places, tmp_path / "metrics.jsonl", 2, flags, *arguments)
    texts = [warning["text"] for warning in warnings]
    # The first iteration is left out: windows end after the 3rd and the 5th.
    assert [warning["iteration"] for warning in warnings] == ([] if slow is None else [3, 5])
    last = lines[-1]
    if slow is None:
        return
    assert all(text.startswith(f"straggler: rank 1 on {socket.gethostname()} computes ") for text in texts)
    assert "x the median" in texts[0]
    # Both ranks take as long; what one sleeps the other waits.
    assert last["step-time-max"] - last["step-time-min"] < 0.5
    assert last["compute-time-max"] > 1.0 > last["compute-time-min"]
    assert last["communication-wait-max"] > 0.5 > last["data-wait-max"]
