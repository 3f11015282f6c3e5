"""What the memory report measures is what the plan predicts, in every layout; and how it is shown."""

import json
import os
from unittest import mock

import pytest

from mindspeed_llm.checkpoint.toy import make_toy
from mindspeed_llm.testing.layouts import _environment, _GivenRows, _plan, make_rows
from mindspeed_llm.testing.pool import pool

TOKENS = 192
ROWS = make_rows(8, longest=TOKENS, equal=True)
PP2, TP2 = "--pipeline-model-parallel-size 2", "--tensor-model-parallel-size 2 --sequence-parallel"
FULL = "--recompute-granularity full --recompute-method"
MAIN = ("weights", "gradients", "optimizer", "activations", "temporary", "together")
PRECISE = 1.01
CLOSE = 1.1
"""Weights, gradients and optimizer are right within the first factor, activations within the second."""
# AdamW counts the steps of each tensor in four bytes, on the device whatever else is elsewhere.
STEP_COUNTS = 1024

# name -> (kind of model, processes, flags)
CASES = {
    "dense": ("llama", 1, ""),
    "bf16": ("llama", 1, "--bf16"),
    "all logits": ("llama", 1, "--no-cross-entropy-loss-fusion"),
    "loss in chunks": ("llama", 1, "--bf16 --loss-chunk-size 64"),
    "batches": ("llama", 1, "--micro-batch-size 2"),
    "norms": ("llama", 1, "--recompute-norm"),
    "activation functions": ("llama", 1, "--recompute-activation-function --bf16"),
    "layers": ("llama", 1, f"{FULL} uniform --recompute-num-layers 1"),
    "pairs of layers": ("llama", 1, f"{FULL} uniform --recompute-num-layers 2"),
    "some layers": ("llama", 1, f"{FULL} block --recompute-num-layers 3"),
    "plain attention": ("llama", 1, "--bf16 --no-use-flash-attn"),
    "tied": ("qwen", 1, "--bf16"),
    "LoRA": ("llama", 1, "--lora-r 4"),
    "LoRA on attention": ("llama", 1, "--lora-r 4 --lora-target-modules q_proj v_proj --bf16"),
    "LoRA with magnitudes": ("llama", 1, "--lora-r 4 --use-dora --lora-target-modules q_proj down_proj --bf16"),
    "LoRA with magnitudes of experts": ("mixtral", 1, "--lora-r 4 --use-dora --moe-grouped-gemm"),
    "experts": ("mixtral", 1, ""),
    "experts in bf16": ("mixtral", 1, "--bf16"),
    "experts recomputed": ("mixtral", 1, "--moe-zero-memory level0"),
    "experts' activation functions": ("mixtral", 1, "--recompute-activation-function"),
    "grouped experts": ("mixtral", 1, "--moe-grouped-gemm --bf16"),
    "latent": ("deepseek_v3", 1, ""),
    "stages": ("llama", 2, PP2),
    "virtual stages": ("llama", 2, f"{PP2} --num-virtual-stages-per-pipeline-rank 2"),
    "tensors": ("llama", 2, TP2),
    "LoRA over tensors": ("llama", 2, f"{TP2} --lora-r 4"),
    "contexts": ("llama", 2, "--context-parallel-size 2"),
    "moments in bf16": ("llama", 1, "--bf16 --o2-optimizer"),
    "halves of weights": ("llama", 1, "--bf16 --reuse-fp32-param"),
    "optimizer elsewhere": ("llama", 1, "--bf16 --swap-optimizer"),
    "replicas": ("llama", 2, "--use-distributed-optimizer --bf16"),
    "experts apart": ("mixtral", 2, "--expert-model-parallel-size 2"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root, wide = tmp_path_factory.mktemp("toys"), {"num_hidden_layers": 8, "initializer_range": 0.02}
    return {
        "llama": str(make_toy("llama", root / "llama", **wide)),
        "qwen": str(make_toy("qwen2", root / "qwen", tie_word_embeddings=True, **wide)),
        "mixtral": str(make_toy("mixtral", root / "mixtral", **wide)),
        "deepseek_v3": str(make_toy("deepseek_v3", root / "deepseek", **wide)),
    }


class Listener:
    """A reporter that remembers."""

    active = True

    def __init__(self):
        self.events, self.lines = [], []

    def event(self, kind, facts, iteration):
        self.events.append((kind, iteration, facts))

    def say(self, line):
        self.lines.append(line)


def reported(model, flags, rows=ROWS, steps=3):
    """Train on this rank with the report.

    Returns:
        Its events and lines.
    """
    from mindspeed_llm.training.loop import Progress, TrainingLoop
    from mindspeed_llm.training.memory_report import MemoryReport
    from mindspeed_llm.training.run import make_optimizer
    from mindspeed_llm.training.setup import build, start_processes

    with mock.patch.dict(os.environ, _environment()):
        plan = _plan(model, flags, len(rows), steps, "posttrain")
        start_processes(plan)
    built = build(plan)
    optimizer, scheduler = make_optimizer(plan, built, steps)
    listener, hooks = Listener(), [MemoryReport(plan, built)]
    data = _GivenRows(plan, rows)
    loop = TrainingLoop(plan, built, optimizer, scheduler, data, listener, Progress(), steps, None, hooks)
    for _ in range(steps):
        loop.step()
        loop.wish()
    return listener.events, listener.lines


def of(models, case):
    kind, world, flags = CASES[case]
    flags = f"--seq-length {TOKENS} " + ("" if "--micro-batch-size" in flags else "--micro-batch-size 1 ") + flags
    return pool(world).run(reported, models[kind], flags)[0]


def check(found):
    """Raises AssertionError where prediction and measurement differ by more than is said above."""
    for name, factor in (("weights", PRECISE), ("gradients", PRECISE), ("optimizer", PRECISE), ("activations", CLOSE)):
        row = found[name]
        assert row["predicted"] / factor <= row["max"] <= row["predicted"] * factor + STEP_COUNTS, (name, row)


@pytest.mark.parametrize("case", CASES)
def test_what_is_measured_was_predicted(models, case):
    events, lines = of(models, case)
    [(kind, iteration, facts)] = events
    assert (kind, iteration) == ("memory", 2)  # once, and not in the third iteration
    check(facts["bytes"])
    parts = [name for name in facts["bytes"] if name not in MAIN]
    assert sum(facts["bytes"][name]["max"] for name in parts) >= facts["bytes"]["activations"]["max"]


def test_a_wrong_prediction_is_noticed(models):
    """Negative control: recomputed activations beside the prediction of a run that keeps them."""
    kept, dropped = (of(models, case)[0][0][2]["bytes"] for case in ("dense", "layers"))
    wrong = {name: dict(row, predicted=kept[name]["predicted"]) for name, row in dropped.items() if name in kept}
    with pytest.raises(AssertionError, match="activations"):
        check(wrong)
    without_bf16 = {name: dict(row, predicted=row["predicted"] / 2) for name, row in kept.items()}
    with pytest.raises(AssertionError, match="weights"):
        check(without_bf16)


def test_the_report_is_a_table_and_a_record(models):
    events, [text] = of(models, "stages")
    title, *rows = text.splitlines()
    assert title.split() == ["memory", "of", "iteration", "2,", "MiB", "predicted", "measured", "on", "rank", "least"]
    by_name = {row[:26].strip(): row for row in rows}
    found = json.loads(json.dumps(events[0][2]))["bytes"]
    for name, row in found.items():
        size = "-" if row["max"] is None else f"{row['max'] / 2**20:,.1f}"
        assert size in by_name[name].split(), (name, by_name[name])
    # The first stage has two micro-batches under way when its first backward pass begins.
    assert found["activations"]["rank"] == 0
    assert found["temporary"]["max"] is None  # not measured on a CPU, and not made up
    assert "a CPU keeps no account of temporary tensors" in rows[-1]


def test_the_report_changes_no_loss_and_leaves_nothing_behind(models):
    """With and without it losses are the same bit for bit."""
    losses, left = zip(*(pool(1).run(losses_of, models["llama"], more)[0] for more in ("", "--no-memory-report")))
    assert losses[0] == losses[1]
    assert left == (0, 0)


def losses_of(model, more):
    """Losses of four steps, the second with the report if the options ask for it, and wrapped methods that are left."""
    from mindspeed_llm.training.loop import Progress, TrainingLoop
    from mindspeed_llm.training.memory_report import MemoryReport
    from mindspeed_llm.training.run import make_optimizer
    from mindspeed_llm.training.setup import build, start_processes

    with mock.patch.dict(os.environ, _environment()):
        plan = _plan(model, f"--seq-length {TOKENS} --micro-batch-size 1 --bf16 {more}", 2, 4, "posttrain")
        start_processes(plan)
    built = build(plan)
    optimizer, scheduler = make_optimizer(plan, built, 4)
    hooks = [MemoryReport(plan, built)] if plan.config.logging.memory_report else []
    data = _GivenRows(plan, ROWS[:2])
    loop = TrainingLoop(plan, built, optimizer, scheduler, data, None, Progress(), 4, None, hooks)
    losses = []
    for _ in range(4):
        losses.append(loop.step()[0].loss)
        loop.wish()
    return losses, sum("forward" in vars(module) for chunk in built.chunks for module in chunk.modules())
