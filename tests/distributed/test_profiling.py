"""Traces of real runs on several ranks: collectives by name, hidden and exposed, on pages beside the traces."""

import contextlib
import io
import json
import os
import pydoc_data.topics
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from mindspeed_llm.__main__ import main
from mindspeed_llm.testing.pool import pool
from mindspeed_llm.training.trace.reading import find_traces, read_trace
from mindspeed_llm.training.trace.summary import summarize, summarize_all
from mindspeed_llm.training.trace.tables import text

COMMON = (
    "--lr 1e-3 --global-batch-size 2 --micro-batch-size 1 --seq-length 128 --split 100 --eval-iters 0 --train-iters 4 "
    "--num-threads 1 --progress lines --profile --profile-step-start 1 --profile-step-end 3 --profile-ranks -1 "
)
LORA_FUSION = "--tensor-model-parallel-size 2 --sequence-parallel --lora-r 4 --lora-fusion-chunks 2"
COC = "--tensor-model-parallel-size 2 --sequence-parallel --use-ascend-coc --coc-parallel-num 4"
PIPELINE = "--pipeline-model-parallel-size 2"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("traced") / "text.jsonl"
    topics = pydoc_data.topics.topics
    path.write_text("".join(json.dumps({"text": topics[name][:900]}) + "\n" for name in sorted(topics)[:30]))
    return path


def run(words, cache):
    """The pre-training door on this rank: what it printed."""
    from mindspeed_llm.cli.training import run_door
    from mindspeed_llm.config.parser import parse

    world = str(dist.get_world_size())
    here = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "RANK": str(dist.get_rank()), "MINDSPEED_LLM_CACHE": cache}
    with mock.patch.dict(os.environ, here), contextlib.redirect_stdout(io.StringIO()) as printed:
        run_door(parse("pretrain", words.split()))
    return printed.getvalue()


@pytest.fixture(scope="module")
def traced(toy_llama, corpus, tmp_path_factory):
    """(folder of traces, what each rank printed) of a run with these flags, run once."""
    made = {}

    def trace(flags):
        if flags not in made:
            folder = tmp_path_factory.mktemp("profile")
            words = f"{COMMON} {flags} --load {toy_llama} --data-path {corpus} --profile-save-path {folder}"
            made[flags] = folder, pool(2).run(run, words, str(corpus.parent / "cache"))
        return made[flags]

    return trace


@pytest.mark.parametrize("flags", [LORA_FUSION, COC, PIPELINE])
def test_what_is_hidden_and_what_is_exposed_is_all_there_is(traced, flags):
    folder, _ = traced(flags)
    found = summarize_all(find_traces([folder]))
    assert [one.rank for one in found] == [0, 1]
    for one in found:
        assert len(one.iterations) == 2 and one.left_out == 0
        for collective in one.collectives.values():
            assert 0 < collective.total == collective.hidden + collective.exposed
            assert collective.hidden >= 0 and collective.exposed >= 0
        assert one.communication.hidden < one.communication.total < one.duration
        assert {"data", "schedule", "forward", "backward", "optimizer", "between iterations"} <= one.phase_wall.keys()
        assert sum(one.phase_wall.values()) > 0.8 * one.duration
        for part in ("attention", "MLP"):
            assert min(one.parts[part]["forward"], one.parts[part]["backward"]) > 0


def test_collectives_branches_and_modules_of_lora_fusion_are_named(traced):
    folder, _ = traced(LORA_FUSION)
    (first, _), found = find_traces([folder]), summarize_all(find_traces([folder]))
    names = {event.name for event in read_trace(first).events}
    said = ("adapter down", "adapter up", "adapter backward", "base product", "start all-gather", "wait for all-gather")
    assert {f"lora: {name}" for name in said} <= names
    assert {"lora: chunk 1 of 2", "lora: chunk 2 of 2"} <= names
    assert {"module: decoder.layers.0.self_attention.linear_qkv", "module: decoder.layers.3.mlp"} <= names
    # Over gloo adapted linears gather and scatter by sending to each other; the output layer gathers as it does.
    assert {"all-gather", "all-to-all", "all-reduce"} <= found[0].collectives.keys()
    assert found[0].collectives["all-to-all"].hidden > 0
    assert found[0].parts["adapters"]["forward"] > 0 and found[0].parts["adapters"]["backward"] > 0


def test_every_rank_leaves_a_page_beside_its_trace(traced, capsys):
    folder, printed = traced(LORA_FUSION)
    for rank, said in enumerate(printed):
        (page,) = folder.glob(f"rank{rank}.*.summary.html")
        assert f"summary of rank {rank}: {page}" in said
        assert "all-gather" in page.read_text() and f"rank {rank} on cpu" in page.read_text()
    assert main(["trace", "summarize", str(folder), "--html", str(folder / "both.html")]) == 0
    assert "all-gather: share hidden" in capsys.readouterr().out
    assert (folder / "both.html").read_text().count("<svg") == 2


def test_chunks_are_named(traced):
    folder, _ = traced(COC)
    found = read_trace(find_traces([folder])[0])
    names = {event.name for event in found.events}
    assert {f"coc: {what} chunk {k} of 4" for what in ("wait for", "product of") for k in (1, 2, 3, 4)} <= names
    assert {"coc: start all-gathers", "coc: start reduce-scatter", "coc: wait for reduce-scatters"} <= names


def test_stages_send_and_receive(traced):
    folder, _ = traced(PIPELINE)
    for one in summarize_all(find_traces([folder])):
        # Iterations, micro-batches, directions; each tensor after its shape.
        assert one.collectives["send and receive"].count == 2 * 2 * 2 * 2
        assert "pipeline" in one.phase_wall


def product(folder, chunks, rows):
    """Share hidden of a gathering product, traced."""
    from torch.profiler import ProfilerActivity, profile

    from mindspeed_llm.ops.parallel_matmul import chunked_all_gather_matmul, gather_then_multiply

    x, weight = torch.ones(rows, 1, 256), torch.ones(512, 256)
    kernel = chunked_all_gather_matmul if chunks > 1 else gather_then_multiply
    with profile(activities=[ProfilerActivity.CPU]) as running:
        for _ in range(3):
            kernel(x, weight, dist.group.WORLD, chunks)
    path = f"{folder}/rank{dist.get_rank()}.{chunks}.pt.trace.json"
    running.export_chrome_trace(path)
    found = summarize(path).collectives["all-gather"]
    return found.count, found.share_hidden


def test_chunks_hide_and_one_after_the_other_does_not(tmp_path):
    for count, share in pool(2).run(product, str(tmp_path), 8, 4096):
        assert count == 24 and share > 0.05
    for count, share in pool(2).run(product, str(tmp_path), 1, 4096):
        assert count == 3 and share < 0.01


def test_a_trace_that_cannot_be_summed_up_does_not_stop_training(toy_llama, corpus, tmp_path):
    words = f"{COMMON} --load {toy_llama} --data-path {corpus} --profile-save-path {tmp_path}"
    (printed,) = pool(1).run(run_with_lost_trace, words, str(corpus.parent / "cache"))
    assert "no summary of rank 0: trace:" in printed and "is no whole trace" in printed
    assert "4/       4" in printed


def run_with_lost_trace(words, cache):
    """As `run`, with a trace that ends in the middle."""
    from mindspeed_llm.training import profiling

    def cut(path):
        path.write_text(path.read_text()[:-100])
        return summarize(path)

    with mock.patch.object(profiling, "summarize", cut):
        return run(words, cache)


def test_the_manual_shows_what_is_printed(traced):
    """Titles of the tables and states of a device; figures are others on other machines."""
    folder, _ = traced(LORA_FUSION)
    shown = text(summarize_all(find_traces([folder]))[:1])
    manual = (Path(__file__).parents[2] / "docs" / "profiling.md").read_text().split("```\n")[3]
    assert _titles(manual) == _titles(shown)
    states = [[line.split("  ")[0] for line in lines.splitlines()[4:9]] for lines in (manual, shown)]
    assert states[0] == states[1] == list(summarize(find_traces([folder])[0]).times.named())


def _titles(lines):
    """The lines that are underlined, without the widths of columns."""
    rows = lines.splitlines()
    return [row.split() for row, under in zip(rows, rows[1:]) if under.startswith("---")]
