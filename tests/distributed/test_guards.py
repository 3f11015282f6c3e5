"""Faults put into a run on several ranks: who and what is named, and that nothing else has changed."""

import json
import os
import pydoc_data.topics
from unittest import mock

import pytest
import torch

from mindspeed_llm.checkpoint.toy import make_toy
from mindspeed_llm.errors import UserError
from mindspeed_llm.testing.pool import pool

COMMON = (
    "--stage sft --prompt-type chatml --seq-length 192 --lr 1e-3 --lr-decay-iters 20 --global-batch-size 4 "
    "--micro-batch-size 2 --eval-iters 0 --no-shuffle --split 100,0,0 --hidden-dropout 0.1 --num-threads 1 "
    "--progress lines --train-iters 4"
)
MARK = 7
EMBEDDING = "embedding.word_embeddings"


class Fault:
    """Does `harm` to the embedding's output at one sample, on the ranks that have it; remembers the state before.

    Args:
        sample: its number in the training part; None for no sample.
        harm: "output" (nan), "output once" (a little, in the first pass), "every" (nan at all samples), "gradient"
            (nan), "large gradient", "gradient once" (in the first pass, on the last rank), or "bit NAME": a bit of that
            weight of the second last rank flips after the second step.
    """

    def __init__(self, sample, harm):
        self.sample, self.harm = sample, harm
        self.before = self.data = self.model = self.optimizer = None
        self.passes = self.updates = 0

    def build(self, real):
        def build(plan):
            self.model = real(plan)
            for chunk in self.model.chunks:
                if hasattr(chunk, "embedding") and self.sample is not None:
                    chunk.embedding.word_embeddings.register_forward_hook(self.hook)
            return self.model

        return build

    def hook(self, module, inputs, output):
        """Output [b, s, h] or [s, b, h]; harm is done at the sample's first token."""
        (ids,) = inputs
        if self.harm == "every":
            return output * float("nan")
        mark = torch.from_numpy(self.data.train.dataset.sample(self.sample)["input_ids"][:MARK])
        if not any((window == mark).all() for row in ids for window in row.unfold(0, MARK, 1)):
            return output
        if self.before is None:
            self.before = self.state()
        self.passes += 1
        where = next(i for i, window in enumerate(ids[0].unfold(0, MARK, 1)) if (window == mark).all())
        place = torch.zeros_like(output)
        if output.shape[:2] == ids.shape:
            place[0, where] = 1
        else:
            place[where, 0] = 1
        if self.harm == "output":
            return output.masked_fill(place.bool(), float("nan"))
        if self.harm == "output once":
            return output + place if self.passes == 1 else output
        return _Harm.apply(output, place, self.harm, self.passes)

    def state(self):
        """Copies of weights, moments, schedule and loss scale."""
        from mindspeed_llm.checkpoint.optimizer_state import own_states

        tensors = [p.detach().clone() for chunk in self.model.chunks for p in chunk.parameters()]
        for own in own_states(self.optimizer):
            tensors += [value.clone() for value in own.values().values()]
        return tensors

    def unchanged(self):
        if self.before is None:
            return None
        return all(torch.equal(a, b) for a, b in zip(self.before, self.state(), strict=True))

    def apply(self, real):
        import torch.distributed as dist

        def apply_gradients(optimizer, norm):
            real(optimizer, norm)
            self.updates += 1
            if self.harm.startswith("bit ") and self.updates == 2 and dist.get_rank() == dist.get_world_size() - 2:
                weight = next(p for n, p in self.model.chunks[0].named_parameters() if n.endswith(self.harm[4:]))
                weight.detach().view(-1).view(torch.int32)[5] ^= 1

        return apply_gradients


class _Harm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output, place, harm, passes):
        ctx.save_for_backward(place)
        ctx.harm, ctx.passes = harm, passes
        return output.clone()

    @staticmethod
    def backward(ctx, grad):
        import torch.distributed as dist

        (place,) = ctx.saved_tensors
        if ctx.harm == "gradient":
            return grad.masked_fill(place.bool(), float("nan")), None, None, None
        if ctx.harm == "large gradient":
            return grad * 1e4, None, None, None
        if ctx.harm == "gradient once" and ctx.passes == 1 and dist.get_rank() == dist.get_world_size() - 1:
            return grad + place * grad.abs().max(), None, None, None
        return grad, None, None, None


def run(words, cache, sample=None, harm="", careless=""):
    """One door on this rank: {"losses", "error", "unchanged", "progress", "said"}."""
    import contextlib
    import io

    import torch.distributed as dist

    from mindspeed_llm.cli.training import run_door
    from mindspeed_llm.config.parser import parse
    from mindspeed_llm.training import loop as loop_module
    from mindspeed_llm.training import run as run_module
    from mindspeed_llm.training.guards.guards import Guards

    here = {"WORLD_SIZE": dist.get_world_size(), "RANK": dist.get_rank(), "LOCAL_WORLD_SIZE": dist.get_world_size()}
    os.environ.update({k: str(v) for k, v in here.items()}, MINDSPEED_LLM_CACHE=cache)
    fault, real_data, real_optimizer = Fault(sample, harm), run_module.TrainingData, run_module.make_optimizer

    def data(*args):
        fault.data = real_data(*args)
        return fault.data

    def optimizer(*args):
        fault.optimizer, scheduler = real_optimizer(*args)
        return fault.optimizer, scheduler

    patches = {"TrainingData": data, "make_optimizer": optimizer, "build": fault.build(run_module.build)}
    said, found = io.StringIO(), {"error": None, "losses": None, "progress": None}
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(said))
        for name, value in patches.items():
            stack.enter_context(mock.patch.object(run_module, name, value))
        stack.enter_context(mock.patch.object(loop_module, "apply_gradients", fault.apply(loop_module.apply_gradients)))
        if careless == "steps":
            stack.enter_context(mock.patch.object(Guards, "judge", _careless))
        if careless == "keeps biases":
            stack.enter_context(mock.patch("mindspeed_llm.training.guards.guards.router_buffers", lambda chunks: []))
        try:
            result = run_door(parse("posttrain", words.split()))
            found |= {"losses": [v for _, v in result.history.train], "progress": vars(result.progress)}
        except UserError as refused:
            found["error"] = str(refused)
    return found | {"unchanged": fault.unchanged(), "said": said.getvalue()}


def _careless(self, result, optimizer, progress):
    """A judge that always steps."""
    from mindspeed_llm.training.guards.guards import UPDATE, Verdict
    from mindspeed_llm.training.update import gradient_norm

    return Verdict(UPDATE, gradient_norm(optimizer))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """(rows, the same without those of the second batch, cache directory); answers of about equal length."""
    directory = tmp_path_factory.mktemp("data")
    topics = pydoc_data.topics.topics
    names = sorted(topics)[:40]
    all_rows = [
        {"instruction": f"{i}: {n} is what?", "input": "", "output": " ".join(topics[n].split()[: 5 + i % 3])}
        for i, n in enumerate(names)
    ]
    (directory / "rows.json").write_text(json.dumps(all_rows))
    (directory / "fewer.json").write_text(json.dumps(all_rows[:4] + all_rows[8:]))
    return directory / "rows.json", directory / "fewer.json", str(directory / "cache")


def words(model, data, *more):
    return f"{COMMON} --load {model} --data-path {data} {' '.join(map(str, more))}"


LAYOUTS = {
    "data": ("", 1),
    "data, distributed optimizer, bf16": ("--use-distributed-optimizer --bf16", 1),
    "overlapped": ("--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --bf16", 1),
    "pipeline": ("--pipeline-model-parallel-size 2", 0),
    "interleaved": ("--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2", 0),
    "tensor": ("--tensor-model-parallel-size 2 --bf16", 0),
    "fp16": ("--fp16 --initial-loss-scale 1024", 1),
    "context": ("--context-parallel-size 2", 0),
    "lora": ("--lora-r 4", 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_nan_names_rank_sample_and_module_and_changes_nothing(toy_llama, rows, tmp_path, layout):
    flags, rank = LAYOUTS[layout]
    found = pool(2).run(run, words(toy_llama, rows[0], flags, "--save", tmp_path), rows[2], 6, "output")
    for one in found:
        assert "loss: nan at iteration 2, samples 4, 5, 6, 7" in one["error"]
        assert f"rank {rank} on " in one["error"] and "sample 6 (row 6 of " in one["error"]
        assert "sample 7 (" not in one["error"]
        assert f"first in the output of {EMBEDDING}, " in one["error"]
        assert one["unchanged"] in (True, None)
    assert any(one["unchanged"] for one in found)
    line = json.loads((tmp_path / f"rank_{rank}.nonfinite.jsonl").read_text())
    assert (line["index"], line["iteration"], line["module"]) == (6, 2, EMBEDDING)
    assert "is what?" in line["text"]


def test_a_judge_that_always_steps_would_be_noticed(toy_llama, rows):
    found = pool(2).run(run, words(toy_llama, rows[0]), rows[2], 6, "output", "steps")
    assert found[1]["unchanged"] is False


@pytest.mark.parametrize("flags", ["", "--pipeline-model-parallel-size 2", "--use-distributed-optimizer --bf16"])
def test_a_nan_in_the_gradient_alone_is_found_too(toy_llama, rows, flags):
    found = pool(2).run(run, words(toy_llama, rows[0], flags), rows[2], 6, "gradient")
    rank = 0 if "pipeline" in flags else 1
    for one in found:
        assert "gradient: norm nan at iteration 2" in one["error"]
        assert f"rank {rank} on " in one["error"] and "sample 6 (row 6 of " in one["error"]
        assert f"first in the gradient of the weight of {EMBEDDING}, " in one["error"]
    assert any(one["unchanged"] for one in found) and all(one["unchanged"] in (True, None) for one in found)


@pytest.mark.parametrize("flags", ["", "--use-distributed-optimizer --bf16", "--tensor-model-parallel-size 2"])
def test_a_run_that_leaves_a_batch_out_is_the_run_without_it(toy_llama, rows, tmp_path, flags):
    save = f"--save {tmp_path} --on-nonfinite skip:1"
    found = pool(2).run(run, words(toy_llama, rows[0], flags, save), rows[2], 6, "output")[1]
    without = pool(2).run(run, words(toy_llama, rows[1], flags).replace("--train-iters 4", "--train-iters 3"), rows[2])[
        1
    ]
    assert [loss for i, loss in enumerate(found["losses"]) if i != 1] == without["losses"]
    assert found["losses"][1] != found["losses"][1]
    assert found["progress"]["nan_iterations"] == found["progress"]["skipped_iterations"] == 1
    assert "number of nan iterations:   1" in found["said"] and "skipped samples:            4" in found["said"]
    (skip,) = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert (skip["first"], skip["end"], skip["iteration"]) == (4, 8, 2)


@pytest.fixture(scope="module")
def whole_blocks(tmp_path_factory):
    """A model whose rows are whole blocks of NF4."""
    sizes = dict(hidden_size=128, intermediate_size=128, num_hidden_layers=2)
    return make_toy("llama", tmp_path_factory.mktemp("model") / "llama", **sizes)


@pytest.mark.parametrize("flags", ["--use-distributed-optimizer", "--tensor-model-parallel-size 2"])
def test_a_run_on_nf4_leaves_a_batch_out_and_repeats_another_to_the_bit(whole_blocks, rows, flags):
    """Adapters with dropout: a batch is computed again for its samples, and random states go back."""
    line = f"{flags} --qlora --lora-r 4 --lora-dropout 0.1 --replay-batch-interval 3"
    skipping = words(whole_blocks, rows[0], line, "--on-nonfinite skip:1")
    found = pool(2).run(run, skipping, rows[2], 6, "output")[1]
    fewer = words(whole_blocks, rows[1], line).replace("--train-iters 4", "--train-iters 3")
    without = pool(2).run(run, fewer, rows[2])[1]
    assert found["error"] is without["error"] is None
    assert [loss for i, loss in enumerate(found["losses"]) if i != 1] == without["losses"]
    assert found["progress"]["skipped_iterations"] == 1 and "sample 6 (row 6 of" in found["said"]


def test_on_nf4_a_result_that_differs_the_second_time_is_noticed(whole_blocks, rows):
    line = words(whole_blocks, rows[0], "--qlora --lora-r 4 --replay-batch-interval 2")
    for one in pool(2).run(run, line, rows[2], 6, "output once"):
        assert "repeated batch: another result at iteration 2" in one["error"] and "rank 1 on " in one["error"]


def test_experts_and_the_biases_of_their_scores_are_taken_back_too(rows, tmp_path):
    model = make_toy("deepseek_v3", tmp_path / "toy")
    flags = "--expert-model-parallel-size 2 --moe-router-bias-update-rate 0.1"
    skipping = words(model, rows[0], flags, "--on-nonfinite skip:1")
    found = pool(2).run(run, skipping, rows[2], 6, "output")
    without = pool(2).run(run, words(model, rows[1], flags).replace("--train-iters 4", "--train-iters 3"), rows[2])[1]
    assert [loss for i, loss in enumerate(found[1]["losses"]) if i != 1] == without["losses"]
    assert "sample 6 (row 6 of" in found[1]["said"] and "sample 7 (" not in found[1]["said"]
    careless = pool(2).run(run, skipping, rows[2], 6, "output", "keeps biases")[1]
    assert [loss for i, loss in enumerate(careless["losses"]) if i != 1] != without["losses"]


def test_skips_are_limited_and_stay_on_resume(toy_llama, rows, tmp_path):
    save = f"--save {tmp_path} --save-interval 1 --on-nonfinite skip:1"
    first = pool(2).run(run, words(toy_llama, rows[0], save), rows[2], 6, "output")[1]
    again = words(tmp_path, rows[0], save, "--ckpt-step 1")
    rest = pool(2).run(run, again, rows[2])[1]
    assert rest["losses"][0] != rest["losses"][0], "the batch was left out though nothing was wrong with it this time"
    assert rest["losses"][1:] == first["losses"][2:]
    second = pool(2).run(run, words(toy_llama, rows[0], "--on-nonfinite skip:1"), rows[2], 0, "every")[1]
    assert "at iteration 2, " in second["error"] and "1 batches were left out before" in second["error"]


def test_a_rewind_ends_as_the_run_without_the_batch(toy_llama, rows, tmp_path):
    longer = "--train-iters 5 --save-interval 2"
    rewinding = words(toy_llama, rows[0], f"--save {tmp_path} --on-nonfinite rewind", longer).replace(
        "--train-iters 4", ""
    )
    skipping = words(toy_llama, rows[0], "--on-nonfinite skip:1 --train-iters 5").replace("--train-iters 4", "")
    found = pool(2).run(run, rewinding, rows[2], 14, "output")[1]
    other = pool(2).run(run, skipping, rows[2], 14, "output")[1]
    assert "rewind: from iteration 4 back to the checkpoint after 2" in found["said"]
    assert repr(found["losses"]) == repr(other["losses"]) and len(found["losses"]) == 5
    assert found["progress"]["rewinds"] == 1 and found["progress"]["skipped_samples"] == [[12, 16]]
    nowhere = words(toy_llama, rows[0], f"--save {tmp_path / 'new'} --on-nonfinite rewind")
    assert "no healthy checkpoint to go back to" in pool(2).run(run, nowhere, rows[2], 6, "output")[0]["error"]


SPIKES = "--grad-norm-spike-threshold 20 --spike-window 4"


def test_a_spike_is_left_out_or_said(toy_llama, rows):
    base = words(toy_llama, rows[0], SPIKES)
    skipped = pool(2).run(run, base + " --spike-action skip", rows[2], 14, "large gradient")[1]
    warned = pool(2).run(run, base, rows[2], 14, "large gradient")[1]
    calm = pool(2).run(run, base, rows[2])[1]
    assert "spike: gradient norm " in warned["said"] and warned["progress"]["skipped_iterations"] == 0
    assert "spike" not in calm["said"]
    assert skipped["progress"]["skipped_samples"] == [[12, 16]] and skipped["progress"]["nan_iterations"] == 0
    assert skipped["unchanged"] and not warned["unchanged"]


def test_a_spike_makes_a_checkpoint_unhealthy_and_a_rewind_passes_it(toy_llama, rows, tmp_path):
    flags = f"{SPIKES} --save {tmp_path} --save-interval 1 --spike-action rewind --spike-count 2"
    warned = pool(2).run(run, words(toy_llama, rows[0], flags), rows[2], 14, "large gradient")[1]
    records = {p.name: json.loads((p / "mindspeed_llm.json").read_text()) for p in tmp_path.glob("iter_*")}
    health = {name: record["health"]["healthy"] for name, record in records.items()}
    assert health == {"iter_0000001": True, "iter_0000002": True, "iter_0000003": True, "iter_0000004": False}
    assert warned["progress"]["spiking"] == [[12, 16]]
    at_once = flags.replace("--spike-count 2", "").replace(str(tmp_path), str(tmp_path / "other"))
    found = pool(2).run(run, words(toy_llama, rows[0], at_once), rows[2], 14, "large gradient")[1]
    assert "rewind: from iteration 4 back to the checkpoint after 3" in found["said"]
    assert found["progress"]["skipped_samples"] == [[12, 16]]


REPLICAS = "--check-weight-hash-across-dp-replicas-interval 1"


@pytest.mark.parametrize("flags, size", [("--bf16", 4), ("--tensor-model-parallel-size 2", 4), ("", 2)])
def test_a_flipped_bit_of_one_replica_is_named(toy_llama, rows, flags, size):
    line = words(toy_llama, rows[0], flags, REPLICAS).replace("--micro-batch-size 2", "--micro-batch-size 1")
    found = pool(size).run(run, line, rows[2], None, "bit linear_proj.weight")
    for one in found:
        assert "replicas: copies differ after iteration 2" in one["error"]
        assert "decoder.layers.0.self_attention.linear_proj.weight" in one["error"]
        assert ("on rank 2 (" in one["error"]) == (flags == "--bf16")
        assert one["error"].count("differs") == 1
    calm = pool(size).run(run, line, rows[2])
    assert all(one["error"] is None for one in calm)


def test_a_flipped_bit_of_an_expert_or_a_tied_embedding_is_named(toy_qwen, rows, tmp_path):
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, shared_expert_intermediate_size=80)
    sparse = make_toy("qwen2_moe", tmp_path / "toy", num_key_value_heads=4, **experts)
    for model, flags, size, weight in (
        (
            sparse,
            "--expert-model-parallel-size 2 --micro-batch-size 1",
            4,
            "mlp.experts.local_experts.1.linear_fc1.weight",
        ),
        (toy_qwen, "--pipeline-model-parallel-size 2 --micro-batch-size 2", 2, f"{EMBEDDING}.weight"),
    ):
        line = words(model, rows[0], flags, REPLICAS).replace("--micro-batch-size 2", "", 1)
        assert [one["error"] for one in pool(size).run(run, line, rows[2])] == [None] * size
        for one in pool(size).run(run, line, rows[2], None, f"bit {weight}"):
            assert "replicas: copies differ after iteration 2" in one["error"] and weight in one["error"]
            assert one["error"].count("differs between ranks") == 1


@pytest.mark.parametrize("flags", ["", "--pipeline-model-parallel-size 2", "--use-distributed-optimizer --bf16"])
def test_a_gradient_that_differs_the_second_time_is_noticed(toy_llama, rows, flags):
    line = words(toy_llama, rows[0], flags)
    twice = line + " --replay-batch-interval 2"
    calm, plain = pool(2).run(run, twice, rows[2])[1], pool(2).run(run, line, rows[2])[1]
    assert calm["losses"] == plain["losses"] and len(plain["losses"]) == 4
    if "pipeline" in flags:  # the embedding is on the first stage, where nothing is harmed
        return
    found = pool(2).run(run, twice, rows[2], 6, "gradient once")
    for one in found:
        assert "repeated batch: another result at iteration 2" in one["error"]
        assert "rank 1 on " in one["error"] and "rank 0 on " not in one["error"]
        assert f"the gradient of {EMBEDDING}.weight" in one["error"]


def test_a_spike_of_the_loss_is_said_too(toy_llama, rows):
    calm = "--loss-spike-threshold 1e6 --spike-window 4"
    touchy = "--loss-spike-threshold 1e-9 --spike-window 4 --lr 1 --lr-decay-style constant"
    said = pool(2).run(run, words(toy_llama, rows[0], touchy).replace("--lr 1e-3", ""), rows[2])[1]["said"]
    assert "warning: spike: loss " in said and "deviations above the median" in said
    assert "spike" not in pool(2).run(run, words(toy_llama, rows[0], calm), rows[2])[1]["said"]


@pytest.mark.parametrize("flags", ["", "--use-distributed-optimizer --bf16", "--tensor-model-parallel-size 2"])
def test_a_large_gradient_of_the_embedding_marks_a_checkpoint(toy_llama, rows, tmp_path, flags):
    line = words(toy_llama, rows[0], flags, "--train-iters 1").replace("--train-iters 4", "")
    reasons = {}
    for name, limit in (("low", 1e-6), ("high", 1e6)):
        more = f" --embedding-local-norm-threshold {limit} --save {tmp_path / name}"
        pool(2).run(run, line + more, rows[2])
        health = json.loads((tmp_path / name / "iter_0000001" / "mindspeed_llm.json").read_text())["health"]
        reasons[name] = health["reasons"]
        assert health["healthy"] == (name == "high")
    assert reasons["high"] == [] and "gradient norm of the word embeddings" in reasons["low"][0]
    alone = f"{words(toy_llama, rows[0], '--train-iters 1')} --save {tmp_path / 'one'}".replace("--train-iters 4", "")
    pool(1).run(run, alone + " --embedding-local-norm-threshold 1e-6", rows[2])
    (one,) = json.loads((tmp_path / "one" / "iter_0000001" / "mindspeed_llm.json").read_text())["health"]["reasons"]
    norms = [float(reason.split(" is above")[0].split()[-1]) for reason in (one, reasons["low"][0])]
    assert norms[1] == pytest.approx(norms[0], rel=0.1)


def count(words, cache, unguarded=False):
    """Collectives and values read back from the device in the third step, on this rank."""
    import contextlib

    from torch.profiler import ProfilerActivity, profile

    from mindspeed_llm.training.guards.guards import Guards
    from mindspeed_llm.training.loop import TrainingLoop

    counts, real = {}, TrainingLoop.step

    def step(self):
        if self.progress.iteration != 2:
            return real(self)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            result = real(self)
        for event in seen.key_averages():
            if event.key.startswith("c10d::") or event.key == "aten::_local_scalar_dense":
                counts[event.key] = event.count
        return result

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(TrainingLoop, "step", step))
        if unguarded:
            stack.enter_context(mock.patch.object(Guards, "judge", _careless))
            stack.enter_context(mock.patch.object(Guards, "run", lambda self, batch, progress: batch()))
        assert run(words, cache)["error"] is None
    return counts


def test_guards_add_no_collective_and_no_wait_while_all_is_well(toy_llama, rows):
    line = words(toy_llama, rows[0])
    plain = pool(2).run(count, line, rows[2], True)[1]
    assert plain["c10d::allreduce_"] >= 3  # gradients, their norm, the loss
    watched = f" {SPIKES} --loss-spike-threshold 9 --embedding-local-norm-threshold 9 --on-nonfinite skip:3"
    for more in ("", watched):
        assert pool(2).run(count, line + more, rows[2])[1] == plain
    assert pool(2).run(count, f"{line} {REPLICAS}", rows[2])[1] != plain
