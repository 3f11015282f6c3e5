"""Parts of monitoring by themselves: what is counted, timed, compared, and shown in the log line."""

import re
import time

import pytest
import torch
import torch.distributed as dist

from mindspeed_llm.errors import UserError
from mindspeed_llm.parallel.layer_map import layer_map
from mindspeed_llm.parallel.layout import ParallelLayout
from mindspeed_llm.training.monitor import timing
from mindspeed_llm.training.monitor.attention import max_logit
from mindspeed_llm.training.monitor.places import Places
from mindspeed_llm.training.monitor.ranks import RankReport, local_figures, stragglers, timing_figures, timing_line

TEXT = "--seq-length 64 --lr 1e-3 --global-batch-size 4 --micro-batch-size 2 --split 100 --train-iters 2 --eval-iters 0"


def log_lines(text):
    return [line for line in text.splitlines() if re.search(r"iteration +\d+/", line)]


def test_memory_is_in_the_log_line_on_request(door, toy_llama, corpus, capsys):
    run = f"{TEXT} --load {toy_llama} --data-path {corpus}"
    door("pretrain", run)
    assert "memory" not in log_lines(capsys.readouterr().out)[0]
    door("pretrain", f"{run} --log-memory")
    found = re.search(r"\| resident memory \(GB\): (\d+\.\d\d) \|", log_lines(capsys.readouterr().out)[0])
    assert 0.1 < float(found.group(1)) < 100


def test_norms_are_in_the_log_line_on_request(door, toy_llama, corpus, capsys):
    """--log-params-norm and --log-num-zeros-in-grad, where Megatron has them."""
    from mindspeed_llm.checkpoint.detect import open_source

    door("pretrain", f"{TEXT} --load {toy_llama} --data-path {corpus} --log-params-norm --log-num-zeros-in-grad")
    line = log_lines(capsys.readouterr().out)[0]
    found = re.search(r"grad norm: [\d.]+ \| num zeros: (\d+) \| params norm: ([\d.]+) \| number of skipped", line)
    source = open_source(toy_llama)
    tensors = [source.read(name) for name in source.names()]
    assert float(found.group(2)) == pytest.approx(
        float(sum(t.double().square().sum() for t in tensors)) ** 0.5, abs=1e-3
    )
    assert 0 < int(found.group(1)) < sum(t.numel() for t in tensors)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("packed", [False, True])
def test_the_largest_logit_is_that_of_visible_pairs(window, packed):
    torch.manual_seed(0)
    query, key = torch.randn(12, 1, 4, 8), torch.randn(12, 1, 2, 8)
    bounds = [0, 5, 12] if packed else [0, 12]
    seen = []
    for i in range(12):
        for j in range(i + 1):
            same = any(a <= j <= i < b for a, b in zip(bounds, bounds[1:]))
            if same and (window is None or i - j < window):
                seen += [float(query[i, 0, h] @ key[j, 0, h // 2]) * 0.3 for h in range(4)]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32) if packed else None
    found = max_logit(query, key, scale=0.3, window_size=window, cu_seqlens=cu_seqlens)
    assert float(found) == pytest.approx(max(seen), rel=1e-6)
    hidden = torch.ones(1, 1, 12, 12, dtype=torch.bool)
    hidden[0, 0, 3, 9] = False
    only = max(float(query[3, 0, h] @ key[9, 0, h // 2]) for h in range(4)) * 8**-0.5
    assert float(max_logit(query, key, scale=None, hidden=hidden)) == pytest.approx(only, rel=1e-6)


def test_long_sequences_are_looked_at_in_blocks(monkeypatch):
    query, key = torch.randn(50, 2, 4, 8), torch.randn(50, 2, 4, 8)
    whole = max_logit(query, key, scale=None)
    monkeypatch.setattr("mindspeed_llm.training.monitor.attention.QUERIES_AT_ONCE", 7)
    assert torch.equal(max_logit(query, key, scale=None), whole)


def test_every_tensor_has_a_place(toy_llama):
    from mindspeed_llm.models.hf_config import read_hf_config, shape_from_hf

    places = Places.of(shape_from_hf(read_hf_config(toy_llama)))
    assert places.names == ("layer-1", "layer-2", "layer-3", "layer-4", "embedding", "final-layernorm", "output")
    for name, part in {
        "decoder.layers.2.mlp.linear_fc1.weight": "layer-3",
        "embedding.word_embeddings.weight": "embedding",
        "decoder.final_layernorm.weight": "final-layernorm",
        "output_layer.weight": "output",
    }.items():
        assert places.names[places.number(name)] == part


@pytest.fixture
def one_process_group():
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return dist.group.WORLD


def test_the_clock_tells_waiting_from_work(one_process_group, monkeypatch):
    originals = {name: vars(owner)[name] for owner, name in ((timing.Work, "wait"), (timing.ProcessGroup, "allreduce"))}
    slow = originals["wait"]
    monkeypatch.setattr(timing.Work, "wait", lambda work, *rest: (time.sleep(0.05), slow(work, *rest))[1])
    clock = timing.StepClock(window=2)
    try:
        for _ in range(3):
            clock.begin()
            time.sleep(0.02)
            clock.have_data()
            time.sleep(0.03)
            dist.all_reduce(torch.ones(3))
            clock.end()
        dist.all_reduce(torch.ones(3))  # between iterations: nobody's wait
        found = clock.mean(last=5)
    finally:
        clock.close()
    assert 0.05 <= found.communication < 0.2
    assert 0.02 <= found.data < 0.15
    assert 0.03 <= found.compute < 0.2
    assert found.step == pytest.approx(found.communication + found.data + found.compute)
    assert vars(timing.ProcessGroup)["allreduce"] is originals["allreduce"]


def test_a_clock_without_an_iteration_says_so():
    with pytest.raises(ValueError, match="no iteration has ended"):
        timing.StepClock(window=2).mean(last=1)


def layout(world_size, pp=1, tp=1):
    return ParallelLayout(layer_map(4, pp), world_size=world_size, tp=tp)


def report(compute):
    return RankReport(step=1.0, compute=compute, window_compute=compute, communication=1 - compute)


HOSTS = ["a", "a", "b", "b"]


def test_stragglers_are_compared_with_their_stage():
    reports = [report(x) for x in (0.1, 0.1, 0.25, 0.1)]
    (line,) = stragglers(reports, HOSTS, layout(4), 2.0, 10)
    assert line.startswith("straggler: rank 2 on b computes 2.5x the median, 250.0 ms of its own work per iteration")
    assert stragglers(reports, HOSTS, layout(4), 3.0, 10) == []
    # Stages have different work: the second one's two ranks are alike, the first one's are not.
    stages = [report(x) for x in (0.1, 0.3, 0.3, 0.3)]
    (line,) = stragglers(stages, HOSTS, layout(4, pp=2), 2.0, 10)
    assert "rank 1 on a" in line
    assert stragglers([report(x) for x in (0.1, 0.1, 0.3, 0.3)], HOSTS, layout(4, pp=2), 2.0, 10) == []


def test_times_are_summed_up():
    reports = [report(x) for x in (0.1, 0.2, 0.4, 0.3)]
    found = timing_figures(reports)
    assert (found["compute-time-min"], found["compute-time-max"]) == (0.1, 0.4)
    assert found["compute-time-median"] == pytest.approx(0.25)
    assert found["communication-wait-max"] == pytest.approx(0.9)
    line = timing_line(reports, HOSTS)
    assert "compute time: 100.0 (rank 0 on a) / 250.0 / 400.0 (rank 2 on b)" in line


def test_local_figures_leave_out_copies():
    """Tensor-parallel ranks have copies of the loss; a replica without a trained token has no mean."""
    reports = [RankReport(loss=6.0, tokens=3, square_norm=9.0), RankReport(loss=6.0, tokens=3, square_norm=36.0)]
    found = local_figures([*reports, RankReport(), RankReport()], layout(4, tp=2))
    assert found == {"local-loss/replica-0": 2.0, "local-grad-norm/rank-0": 1.0, "local-grad-norm/rank-1": 2.0}


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--log-local-norms --overlap-grad-reduce", "--log-local-norms does not go with --overlap-grad-reduce"),
        ("--log-expert-load", "--log-expert-load: no meaning for a model without experts"),
        ("--straggler-threshold 1", "--straggler-threshold: 1.0 is wrong; legal: more than 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(door, toy_llama, corpus, flags, said):
    with pytest.raises(UserError, match=re.escape(said)):
        door("pretrain", f"{TEXT} --load {toy_llama} --data-path {corpus} {flags}")
