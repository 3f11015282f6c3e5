"""The benchmark scripts run, train the same thing on all sides, and print one JSON line."""

import importlib
import json
import os
import runpy
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from mindspeed_llm.accelerator import host_compiler
from mindspeed_llm.ops import registry

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"

# Whether there is a side with compiled operators.
COMPILES = host_compiler.why_not() is None


@pytest.fixture
def script(monkeypatch, capsys):
    """run("train", "--quick", ...) -> what the script prints, read as JSON."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")

    def run(name, *words):
        monkeypatch.setattr(sys, "argv", [name, *words])
        runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
        [line] = capsys.readouterr().out.strip().splitlines()
        return json.loads(line)

    return run


@pytest.mark.slow
def test_all_sides_of_training_train_the_same(script):
    """But the compiled peer, whose kernels take a minute to compile: a test of its own compiles it without kernels."""
    compiled = ["ours_packed_compiled", "ours_packed_prepacked"] * COMPILES
    sides = ["ours_joined", "ours_packed", "ours_packed_keep", *compiled, "peer_padded", "peer_grouped"]
    sides += [f"peer_packed_{attention}{kept}" for attention in ("mask", "documents") for kept in ("", "_keep")]
    result = script("train", "--quick", "--threads", "1", "--mode", "lora", "--sides", *sides)["lora"]
    losses = result["first_loss"]
    assert set(losses) == set(result["tokens_per_second"]) == set(sides)
    # bf16, and the sides take their first steps one after another on two models.
    assert list(losses.values()) == pytest.approx([losses["ours_joined"]] * len(losses), rel=1e-2)
    assert result["packed_over_fastest_packed_peer"] > 0
    assert ("packed_compiled_over_fastest_packed_peer" in result) == COMPILES
    assert result["fastest_packed_peer"] in ("peer_packed_mask", "peer_packed_documents")
    assert all(share > 0 for share in result["share_of_matmul_rate"].values())


@pytest.mark.slow
def test_pretraining_and_the_start_of_a_run(script):
    sides = ["ours_packed", "peer_packed_mask", "peer_packed_documents"]
    found = script("train", "--quick", "--threads", "1", "--mode", "pretrain", "start", "--sides", *sides)
    losses = found["pretrain"]["first_loss"]
    assert list(losses) == sides
    assert list(losses.values()) == pytest.approx([losses["ours_packed"]] * len(losses), rel=1e-2)
    assert len(found["seconds_to_first_iteration"]) == 2


def test_preprocessing(script):
    result = script("preprocess", "--quick", "--threads", "1")
    assert len(result["megabytes_per_second"]) == 6
    assert all(rate > 0 for rate in result["megabytes_per_second"].values())


@pytest.mark.slow
def test_memory(script, tmp_path):
    rows = ("pre-training", "loss from all logits", "swap, recompute both", "data parallel")
    picture, table, page = (tmp_path / name for name in ("memory.png", "table.md", "page.md"))
    table.write_text("before\n<!-- memory rows -->\nold\n<!-- end of memory rows -->\nafter\n")
    page.write_text("| knob | old ([swap, recompute both](benchmarks.md#memory)), more |\n")
    writing = ("--plot", str(picture), "--markdown", str(table), "--cite", str(page))
    found = script("memory", "--quick", "--threads", "1", *writing, "--only", *rows)["rows"]
    assert list(found) == list(rows) and picture.stat().st_size > 1000
    text = table.read_text()
    assert text.startswith("before\n<!--") and text.endswith("-->\nafter\n") and "old" not in text
    assert "| **two data-parallel ranks** |" in text and f"| {found['data parallel']['peak_mib']:,} |" in text
    speed = (
        f"{found['swap, recompute both']['speed_ratio']:.2f}x ([swap, recompute both](benchmarks.md#memory)), more |"
    )
    assert page.read_text().startswith("| knob | ") and page.read_text().endswith(f"{speed}\n")
    assert found["data parallel"]["loss"] == pytest.approx(found["pre-training"]["loss"], rel=1e-2)
    # bf16 sums of the loss's chunks are taken in another order
    assert found["swap, recompute both"]["loss"] == found["pre-training"]["loss"]
    assert found["loss from all logits"]["loss"] == pytest.approx(found["pre-training"]["loss"], rel=1e-2)
    assert all(row["peak_mib"] >= row["activations_mib"] and row["peak_mib"] > 0 for row in found.values())


@pytest.mark.slow
def test_checkpoints(script, tmp_path):
    result = script("checkpoint", "--quick", "--threads", "1", "--directory", str(tmp_path))
    assert set(result["gigabytes_per_second"]) == {
        "save", "cp", "load", "save_flushed", "cp_flushed", "load_verified"
    }  # fmt: skip
    assert all(rate > 0 for rate in result["gigabytes_per_second"].values())
    assert result["stall_in_steps"] > 0 and set(result["aims"]) <= set(result)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import lengths
    import measure
    import peer

    return lengths, measure, peer


def test_samples_follow_the_histogram(modules):
    lengths, _, _ = modules
    table, counts = lengths.read_histogram()
    samples = lengths.draw_samples(2000, 1000, seed=0)
    mean = np.average(table.sum(1), weights=counts)
    assert np.mean([len(s["input_ids"]) for s in samples]) == pytest.approx(mean, rel=0.1)
    sample = samples[0]
    trained = np.flatnonzero(sample["labels"] != -100)
    assert np.array_equal(sample["labels"][trained], sample["input_ids"][trained + 1])
    assert trained[-1] == len(sample["input_ids"]) - 2


def test_the_peers_packed_batches_keep_documents_apart(modules, toy_llama):
    """Otherwise it would be compared with something that is quicker because it is wrong."""
    lengths, _, peer = modules
    samples = lengths.draw_samples(6, 997, seed=1)
    model = peer.Peer(str(toy_llama), (), 0, learning_rate=0.0).base.float().eval()

    @torch.no_grad()
    def logits(batch, attention=peer.MASKED):
        model.set_attn_implementation(attention)
        return model(**{name: value for name, value in batch.items() if name != "shift_labels"}, use_cache=False).logits

    padded = peer.padded_batch(samples)
    apart = logits(padded)[padded["attention_mask"].bool()]
    documents = peer.document_batch(samples)
    assert torch.allclose(logits(peer.packed_batch(samples))[0], apart, atol=1e-4)
    assert torch.allclose(logits(documents, peer.PER_DOCUMENT)[0], apart, atol=1e-4)
    documents["document_lengths"] = documents["document_lengths"].sum(0, keepdim=True)
    assert not torch.allclose(logits(documents, peer.PER_DOCUMENT)[0], apart, atol=1e-2)


@pytest.mark.slow
def test_the_compiled_peer_trains_the_same_and_is_compiled_once(modules, toy_llama, monkeypatch):
    lengths, _, peer = modules
    monkeypatch.setattr(peer, "BACKEND", "aot_eager")
    first, second, third = ([peer.document_batch(lengths.draw_samples(count, 997, seed=count))] for count in (6, 4, 9))

    def losses(steps, compiled=False):
        side = peer.Peer(str(toy_llama), ("q_proj", "down_proj"), 4, learning_rate=1e-2, compiled=compiled)
        found = [side.step(steps[0], peer.PER_DOCUMENT)]
        # Rows of other documents are no reason to compile again.
        with torch.compiler.set_stance("fail_on_recompile") if compiled else nullcontext():
            return found + [side.step(step, peer.PER_DOCUMENT) for step in steps[1:]]

    plain = losses((first, second, third))
    assert losses((first, second, third), compiled=True) == pytest.approx(plain, rel=2e-3)
    assert losses((first, third, second)) != pytest.approx(plain, rel=2e-3)


def test_sides_take_turns(modules):
    _, measure, _ = modules
    order = []
    seconds = measure.interleaved({name: lambda name=name: order.append(name) for name in "abc"}, 2)
    assert "".join(order) == "abc" + "abc" + "bca"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2, "c": 2}
    assert measure.median_ratio([2, 6, 9], [1, 2, 3]) == 3


def test_a_base_in_nf4_takes_a_quarter_and_errs_as_the_table_does(script):
    result = script("qlora", "--shape", "toy", "--rounds", "1")
    assert result["linears_vs_bf16"] <= 0.28
    assert result["largest_error_of_the_table"] <= result["half_largest_gap"] + 1e-6
    assert result["mean_error"] == pytest.approx(result["mean_error_of_the_table"], rel=0.05)
    assert all(result[f"{name}_gb_per_s"] > 0 for name in ("copy", "quantize", "dequantize"))


@pytest.mark.slow
def test_runs_with_faults_are_compared_with_undisturbed_ones(script):
    result = script("faults", "--quick")
    assert result["faults"] == 2 and result["wrong"] == {} and result["most_iterations_lost"] <= 1


@pytest.fixture
def over_a_cable(monkeypatch):
    """Runs a benchmark of two ranks at toy size; returns what it prints."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    if not importlib.import_module("veth").is_possible():
        pytest.skip("two network namespaces and a cable between them need root, `ip` and `tc`")

    def run(name):
        words = [sys.executable, "-W", "ignore", f"{name}.py", "--quick"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, cwd=BENCHMARKS, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.mark.slow
def test_fused_adapters_over_a_cable(over_a_cable):
    results = over_a_cable("lora_fusion")["results"]
    assert [r["megabits"] for r in results] == [100, 0]
    for sides in results:
        assert all(sides[name] > 0 for name in ("unfused", "coc", "fused", "path", "computation", "communication"))


@pytest.mark.slow
def test_experts_over_a_cable(over_a_cable):
    rows = over_a_cable("moe_overlap")["rows"]
    assert all(r[name] > 0 for r in rows for name in ("off", "parts", "computation", "communication"))


@pytest.fixture
def operator_records(monkeypatch, capsys):
    """Machine and records of benchmarks/operators.py at toy size."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def run(*words):
        sizes = ["--shapes", "toy", "--tokens", "32", "--rounds", "1"]
        monkeypatch.setattr(sys, "argv", ["operators", *sizes, *words])
        runpy.run_path(str(BENCHMARKS / "operators.py"), run_name="__main__")
        return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]

    return run


def test_every_operator_of_one_rank_is_measured_beside_its_reference(operator_records):
    machine, *records = operator_records("--dtypes", "fp32")
    of_several_ranks = {"all_gather_matmul", "matmul_reduce_scatter"}
    assert {r["operator"] for r in records} == set(registry.operators()) - of_several_ranks
    assert {r["operator"] for r in records} == {r["operator"] for r in records if r["side"] == registry.REFERENCE}
    assert all(r["forward_ms"] > 0 and r["forward_of_limit"] > 0 for r in records)
    assert machine["threads"] == torch.get_num_threads()


def test_torch_and_the_limit_stand_beside_what_is_chosen(operator_records):
    _, *records = operator_records("--dtypes", "bf16", "--only", "rms_norm", "attention")
    assert {(r["operator"], r["side"]) for r in records} >= {("rms_norm", "F.rms_norm"), ("attention", "SDPA")}
    assert sorted(r["operator"] for r in records if r["chosen"]) == ["attention", "rms_norm"]
    assert all(r["both_of_chosen"] == 1.0 for r in records if r["chosen"])
    assert {(r["operator"], r["both_limit"]["of"]) for r in records} == {("rms_norm", "copy"), ("attention", "product")}


def test_a_faster_side_than_the_chosen_one_is_named(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import operators as benchmark

    record = {"shapes": "toy", "dtype": "fp32", "operator": "rms_norm", "side": "torch"}
    assert benchmark.behind([record | {"forward_of_chosen": 0.98, "both_of_chosen": 1.4}]) == []
    [line] = benchmark.behind([record | {"forward_of_chosen": 0.8, "both_of_chosen": 1.4}])
    assert "rms_norm forward: torch takes 0.8" in line
