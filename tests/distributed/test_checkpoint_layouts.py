"""A run saved at one layout continues at another: weights, moments, fp32 masters, schedule and place in the data."""

import json
import os
import pydoc_data.topics

import pytest
import torch

from mindspeed_llm.checkpoint.toy import make_toy
from mindspeed_llm.errors import UserError
from mindspeed_llm.testing.pool import pool

PP2, TP2 = "--pipeline-model-parallel-size 2", "--tensor-model-parallel-size 2"
VPP2 = f"{PP2} --num-virtual-stages-per-pipeline-rank 2"
SHARED = "--use-distributed-optimizer"
OVERLAPS = f"{SHARED} --overlap-grad-reduce --overlap-param-gather"
COMMON = (
    "--train-iters 8 --lr 1e-4 --global-batch-size 4 --seq-length 192 --eval-iters 0 --prompt-type chatml "
    "--progress lines --num-threads 1"
)
# Each takes one step and hands on.
RELAY = [
    (1, ""),
    (2, PP2),
    (2, OVERLAPS),
    (2, VPP2),
    (4, f"{TP2} --sequence-parallel {SHARED}"),
    (4, f"{PP2} --num-layer-list 3,1 {OVERLAPS}"),
    (4, f"{PP2} {TP2} --noop-layers 0,5"),
    (1, SHARED),
]
CP2 = "--context-parallel-size 2"
BLENDED_RELAY = [(2, CP2), (4, SHARED), (1, ""), (4, f"{CP2} {TP2} --sequence-parallel"), (2, OVERLAPS)]
EXPERT_RELAY = [(2, f"--expert-model-parallel-size 2 {SHARED}"), (1, ""), (2, "--expert-model-parallel-size 2")]
LORA_RELAY = [(2, f"{TP2} --sequence-parallel"), (2, f"{VPP2} {SHARED}"), (4, f"{OVERLAPS} --noop-layers 1"), (1, "")]


def run(words, cache):
    """The post-training door on this rank: training losses, or the refusal's text."""
    import torch.distributed as dist

    from mindspeed_llm.cli.training import run_door
    from mindspeed_llm.config.parser import parse

    here = {"WORLD_SIZE": dist.get_world_size(), "RANK": dist.get_rank(), "LOCAL_WORLD_SIZE": dist.get_world_size()}
    os.environ.update({k: str(v) for k, v in here.items()}, MINDSPEED_LLM_CACHE=cache)
    try:
        result = run_door(parse("posttrain", words.split()))
    except UserError as refused:
        return str(refused)
    return [loss for _, loss in result.history.train]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """(options of data and training, cache)."""
    directory = tmp_path_factory.mktemp("data")
    topics = pydoc_data.topics.topics
    rows = [
        {"instruction": f"What is {n}?", "input": "", "output": " ".join(topics[n].split()[: 4 + i])}
        for i, n in enumerate(sorted(topics)[:40])
    ]
    (directory / "rows.json").write_text(json.dumps(rows))
    return f"{COMMON} --data-path {directory / 'rows.json'}", str(directory / "cache")


@pytest.fixture(scope="module")
def more_rows(tmp_path_factory):
    """Another set of rows."""
    topics = pydoc_data.topics.topics
    path = tmp_path_factory.mktemp("more") / "more.json"
    rows = [{"instruction": n, "input": "", "output": " ".join(topics[n].split()[:40])} for n in sorted(topics)[40:60]]
    path.write_text(json.dumps(rows))
    return path


def start(processes, layout, words, cache):
    """Losses on the last rank."""
    return pool(processes).run(run, f"{words} {layout}", cache)[-1]


def test_layouts_take_over_from_each_other(toy_qwen, words, tmp_path):
    options, cache = words
    expected = start(1, "", f"{options} --load {toy_qwen}", cache)
    found = []
    for number, (processes, layout) in enumerate(RELAY):
        source = toy_qwen if number == 0 else tmp_path
        line = f"{options} --load {source} --save {tmp_path} --exit-interval 1"
        found += start(processes, layout, line, cache)
    assert len(expected) == len(RELAY) == 8
    assert found == pytest.approx(expected, rel=1e-5)
    assert max(found) / min(found) > 1.01  # the batches differ, so the right ones came in the right order


def test_layouts_take_over_adapters_from_each_other(toy_qwen, words, tmp_path):
    options, cache = words
    first = f"{options} --load {toy_qwen} --lora-r 4"
    expected = start(1, "", f"{first} --exit-interval 4", cache)
    found = []
    for number, (processes, layout) in enumerate(LORA_RELAY):
        line = first if number == 0 else f"{options} --load {tmp_path}"
        found += start(processes, layout, f"{line} --save {tmp_path} --exit-interval 1", cache)
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_blend_of_packed_rows_is_read_in_the_same_order_at_any_layout(toy_llama, words, more_rows, tmp_path):
    """Rows are shared by more or fewer data- and context-parallel ranks, the global batch stays the same."""
    options, cache = words
    options = f"{options} 0.6 {more_rows} --neat-pack".replace("--data-path", "--data-path 0.4")
    expected = start(1, "", f"{options} --load {toy_llama} --exit-interval 5", cache)
    found = []
    for number, (processes, layout) in enumerate(BLENDED_RELAY):
        line = f"{options} --load {toy_llama}" if number == 0 else f"--load {tmp_path}"
        losses = start(processes, layout, f"{line} --save {tmp_path} --exit-interval 1", cache)
        assert isinstance(losses, list), losses
        found += losses
    assert found == pytest.approx(expected, rel=1e-5)
    assert len({f"{loss:.4f}" for loss in found}) == 5


def test_experts_and_their_bias_go_on_elsewhere(words, tmp_path):
    options, cache = words
    toy = make_toy("deepseek_v3", tmp_path / "toy", num_hidden_layers=2, num_mtp_layers=0)
    options += " --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 0.01"
    expected = start(1, "", f"{options} --load {toy} --exit-interval 3", cache)
    found = []
    for number, (processes, layout) in enumerate(EXPERT_RELAY):
        line = f"{options} --load {toy if number == 0 else tmp_path / 'out'}"
        found += start(processes, layout, f"{line} --save {tmp_path / 'out'} --exit-interval 1", cache)
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_stage_that_trains_nothing_takes_part(toy_qwen, words, tmp_path):
    """Its optimizer has no state: the second stage's, then the first's when layer 0 lives alone with layer 2."""
    options, cache = words
    options += " --trainable-layers first:1"
    expected = start(1, "", f"{options} --load {toy_qwen} --exit-interval 3", cache)
    found = []
    for number, layout in enumerate([PP2, f"{VPP2} {SHARED}", f"{PP2} {SHARED}"]):
        source = toy_qwen if number == 0 else tmp_path
        found += start(2, layout, f"{options} --load {source} --save {tmp_path} --exit-interval 1", cache)
    assert found == pytest.approx(expected, rel=1e-5)


def stored(directory, vocab_size):
    """Every tensor of the newest checkpoint, without padding of the vocabulary, and the step."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import load_common_state_dict

    (latest,) = directory.glob("iter_*")
    plain = dist_checkpointing.load_plain_tensors(str(latest))
    tensors = {name: value for name, value in plain.items() if torch.is_tensor(value)}
    for name in tensors:
        if name.endswith("embedding.word_embeddings.weight"):
            assert not tensors[name][vocab_size:].any()
            tensors[name] = tensors[name][:vocab_size]
    return tensors, load_common_state_dict(str(latest))["optimizer_step"]


def read(directory):
    """`stored`, in a process that has a process group."""
    return stored(directory, 997)


@pytest.fixture(scope="module")
def two_steps(toy_qwen, words, tmp_path_factory):
    """Checkpoints after two steps of two data-parallel ranks, by precision."""
    options, cache = words
    saved = {}
    for precision in ("", "--bf16"):
        saved[precision] = tmp_path_factory.mktemp("saved")
        line = f"{options} {precision} --load {toy_qwen} --save {saved[precision]} --train-iters 2"
        start(2, OVERLAPS, line.replace("--train-iters 8", ""), cache)
    return saved


@pytest.mark.parametrize(
    "processes, layout",
    [(1, ""), (2, f"{VPP2} {SHARED}"), (4, f"{PP2} {TP2}"), (4, f"{PP2} --num-layer-list 1,3 {OVERLAPS}")],
)  # fmt: skip
@pytest.mark.parametrize("precision", ["", "--bf16"])
def test_what_passes_through_another_layout_keeps_every_bit(two_steps, words, tmp_path, precision, processes, layout):
    """Loaded by a run that has nothing left to do, and saved again by it."""
    options, cache = words
    line = f"{options} {precision} --load {two_steps[precision]} --save {tmp_path}"
    start(processes, layout, line.replace("--train-iters 8", "--train-iters 2"), cache)
    (before, step), (after, step_after) = (pool(1).run(read, d)[0] for d in (two_steps[precision], tmp_path))
    assert step == step_after == 2
    assert before.keys() == after.keys() and any("exp_avg_sq" in name for name in before)
    assert bool(precision) == any("fp32_param" in name for name in before)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name
        assert tensor.any(), name


def test_moments_come_from_where_they_belong(two_steps, toy_qwen):
    """No value has moved to a neighbour: a trained model's masters round to its weights."""
    ((tensors, _),) = pool(1).run(read, two_steps["--bf16"])
    weights = {n: t for n, t in tensors.items() if not n.startswith("optimizer.")}
    assert len(weights) == 4 * 7 + 2
    for name, weight in weights.items():
        assert torch.equal(tensors[f"optimizer.state.fp32_param.{name}"].bfloat16(), weight), name


def test_another_precision_is_refused(two_steps, words, tmp_path):
    options, cache = words
    refusal = start(1, "", f"{options} --no-bf16 --load {two_steps['--bf16']} --save {tmp_path}", cache)
    assert "resume: fp32 is wrong, because the optimizer of" in refusal and "legal: with --bf16" in refusal


def restart(source, target, cache, layout, options):
    """A fine-tuning run that starts from Megatron's files."""
    return run(f"{options} --load {source} --hf-config {target} --exit-interval 1 {layout}", cache)


@pytest.mark.parametrize(
    "written", [dict(tp=2, pp=2, vpp=2), dict(pp=2, layer_list=[3, 1]), dict(pp=2, noop_layers=[0, 5])]
)
def test_megatron_files_of_any_layout_load_at_any_other(toy_qwen, words, tmp_path, written):
    from mindspeed_llm.checkpoint.convert import convert

    options, cache = words
    expected = start(1, "", f"{options} --load {toy_qwen} --exit-interval 1", cache)
    convert(toy_qwen, tmp_path / "one", **written, quiet=True)
    convert(tmp_path / "one", tmp_path / "other", pp=4, quiet=True)
    for source, processes, layout in (("one", 2, VPP2), ("other", 2, TP2)):
        found = pool(processes).run(restart, tmp_path / source, toy_qwen, cache, layout, options)[-1]
        assert found == pytest.approx(expected, rel=1e-5)
