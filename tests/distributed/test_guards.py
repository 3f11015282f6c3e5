"""Faults put into a run on several ranks: who and what is named, and that nothing else has changed."""

import json
import os
import pydoc_data.topics
from pathlib import Path
from unittest import mock

import pytest
import torch

from mindspeed_llm.errors import UserError
from mindspeed_llm.testing.pool import pool

COMMON = (
    "--stage sft --prompt-type chatml --seq-length 192 --lr 1e-3 --lr-decay-iters 20 --global-batch-size 4 "
    "--micro-batch-size 2 --eval-iters 0 --no-shuffle --split 100,0,0 --hidden-dropout 0.1 --num-threads 1 "
    "--progress lines --train-iters 4"
)
MARK = 8
EMBEDDING = "embedding.word_embeddings"


class Fault:
    """Does `harm` to the embedding's output at one sample, on the ranks that have it; remembers the state before.

    Args:
        sample: its number in the training part; None for no sample.
        harm: "output" (nan), "gradient" (nan), "large gradient", "gradient once" (one bit, in the first pass, on
            the last rank), or "bit": a weight of the second last rank changes after the second step.
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
        """Output [s, b, h] or, under sequence parallelism, this rank's part of it; harm is done at the first token."""
        (ids,) = inputs
        mark = torch.from_numpy(self.data.train.dataset.sample(self.sample)["input_ids"][:MARK])
        if not any((window == mark).all() for row in ids for window in row.unfold(0, MARK, 1)):
            return output
        if self.before is None:
            self.before = self.state()
        self.passes += 1
        where = next(i for i, window in enumerate(ids[0].unfold(0, MARK, 1)) if (window == mark).all())
        place = torch.zeros_like(output)
        place[0 if output.shape[0] == 1 else 0].view(-1)[0] = 0
        if output.shape[:2] == ids.shape:
            place[0, where] = 1
        else:
            place[where, 0] = 1
        if self.harm == "output":
            return output.masked_fill(place.bool(), float("nan"))
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
            if self.harm == "bit" and self.updates == 2 and dist.get_rank() == dist.get_world_size() - 2:
                weight = next(p for n, p in self.model.chunks[0].named_parameters() if n.endswith("linear_proj.weight"))
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
            return grad + place * grad.abs().max() * 1e-5, None, None, None
        return grad, None, None, None


def run(words, cache, sample=None, harm="", careless=False):
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
        if careless:
            stack.enter_context(mock.patch.object(Guards, "judge", _careless))
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
        {"instruction": f"{n} is what?", "input": "", "output": " ".join(topics[n].split()[: 5 + i % 3])}
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
    found = pool(2).run(run, words(toy_llama, rows[0]), rows[2], 6, "output", True)
    assert found[1]["unchanged"] is False
