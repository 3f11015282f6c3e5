"""train(6) = train(3) + resume(3), bitwise, in new processes; at another layout the losses agree to 1e-5.

Compared are losses, gradient norms, learning rates and loss scales of every step, and which rows every rank reads.
"""

import json
import os
import pydoc_data.topics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from mindspeed_llm.checkpoint.toy import make_toy
from mindspeed_llm.testing.pool import Pool

ROOT = Path(__file__).parents[2]
ITERATIONS, STOP = 6, 3
COMMON = f"--train-iters {ITERATIONS} --lr 1e-3 --progress lines --num-threads 1 --global-batch-size 4"
TEXT = f"{COMMON} --seq-length 32 --split 80,20 --eval-iters 1"
ROWS = f"{COMMON} --seq-length 128 --prompt-type chatml --split 80,20 --eval-iters 1"
DROPOUT = "--hidden-dropout 0.1 --attention-dropout 0.1"
SHARED = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
BIASED = "--moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 0.01 --moe-router-bias-update-rate 0.1"


@dataclass(frozen=True)
class Case:
    """A run: {toy}, {moe}, {text}, {rows}, ... stand for directories and files; the layout is given to every start."""

    door: str
    words: str
    processes: int = 1
    layout: str = ""


# The training parts are so small that an epoch ends within the six steps, mostly in the middle of a batch.
CASES = {
    "pretrain, blended by weight": Case(
        "pretrain", f"{TEXT} {DROPOUT} --load {{toy}} --data-path 3 {{text}} 2 {{more_text}}"
    ),
    "pretrain, isolated documents, bf16": Case(
        "pretrain", f"{TEXT} --bf16 {DROPOUT} --reset-attention-mask --append-eod --load {{toy}} --data-path {{text}}"
    ),
    "sft, accumulated": Case("posttrain", f"{ROWS} {DROPOUT} --load {{toy}} --data-path {{rows}}"),
    "sft, packed, blended by size": Case(
        "posttrain",
        f"{ROWS} --micro-batch-size 2 {DROPOUT} --neat-pack --load {{toy}} --data-path {{rows}} {{more_rows}}",
    ),
    "lora": Case("posttrain", f"{ROWS} --lora-r 4 --lora-dropout 0.2 --load {{toy}} --data-path {{rows}}"),
    "fp16 that overflows, WSD": Case(
        "posttrain",
        f"{ROWS} --fp16 --initial-loss-scale 4294967296 --loss-scale-window 2 --hysteresis 1 --lr-decay-style WSD "
        "--lr-warmup-iters 2 --load {toy} --data-path {rows}",
    ),
    "experts with bias": Case("posttrain", f"{ROWS} {BIASED} {DROPOUT} --load {{moe}} --data-path {{rows}}"),
    "tensor and sequence": Case(
        "posttrain",
        f"{ROWS} {DROPOUT} --load {{toy}} --data-path {{rows}}",
        2,
        "--tensor-model-parallel-size 2 --sequence-parallel",
    ),
    "pipeline": Case(
        "pretrain", f"{TEXT} {DROPOUT} --load {{toy}} --data-path {{text}}", 2, "--pipeline-model-parallel-size 2"
    ),
    "data, distributed optimizer": Case(
        "posttrain", f"{ROWS} {DROPOUT} --load {{toy}} --data-path {{rows}}", 2, SHARED
    ),
    "data, distributed optimizer, lora, bf16": Case(
        "posttrain", f"{ROWS} --bf16 --lora-r 4 --lora-dropout 0.2 --load {{toy}} --data-path {{rows}}", 2, SHARED
    ),
    "fully sharded, bf16": Case(
        "posttrain", f"{ROWS} --bf16 {DROPOUT} --load {{toy}} --data-path {{rows}}", 2, "--use-torch-fsdp2"
    ),
}


def run(door, words, cache):
    """A door on this rank: [(loss, gradient norm, learning rate, loss scale)] of its steps in hex, [rows read]."""
    import torch.distributed as dist

    from mindspeed_llm.cli.training import run_door
    from mindspeed_llm.config.parser import parse

    world = str(dist.get_world_size())
    os.environ.update(WORLD_SIZE=world, RANK=str(dist.get_rank()), LOCAL_WORLD_SIZE=world, MINDSPEED_LLM_CACHE=cache)
    with recorded() as (steps, read):
        run_door(parse(door, words.split()))
    return steps, read


def recorded():
    """A context in which every step's figures (on the last rank) and every training row that is read are noted."""
    from contextlib import contextmanager
    from unittest import mock

    from mindspeed_llm.data.pretrain_dataset import PretrainDataset
    from mindspeed_llm.data.sft_dataset import SFTDataset
    from mindspeed_llm.training.report import Reporter

    @contextmanager
    def recording():
        steps, read = [], []

        def note(original):
            def sample(self, index):
                if self.start == 0:  # the training part is the first
                    read.append(self.describe(index))
                return original(self, index)

            return sample

        def iteration(self, log):
            if self.active:
                steps.append(tuple(map(float.hex, (log.loss, log.grad_norm, log.learning_rate, log.loss_scale))))

        with (
            mock.patch.object(PretrainDataset, "sample", note(PretrainDataset.sample)),
            mock.patch.object(SFTDataset, "sample", note(SFTDataset.sample)),
            mock.patch.object(Reporter, "iteration", iteration),
        ):
            yield steps, read

    return recording()


@pytest.fixture(scope="module")
def places(tmp_path_factory, toy_llama):
    """What stands in braces in the command lines."""
    directory = tmp_path_factory.mktemp("data")
    topics = pydoc_data.topics.topics
    names = sorted(topics)
    for name, part, length in (("text", names[:3], 400), ("more_text", names[3:9], 700)):
        lines = [json.dumps({"text": topics[n][:length]}) + "\n" for n in part]
        (directory / f"{name}.jsonl").write_text("".join(lines))
    for name, part in (("rows", names[:13]), ("more_rows", names[13:30])):
        rows = [
            {"instruction": f"What is {n}?", "input": "", "output": " ".join(topics[n].split()[: 4 + 2 * i])}
            for i, n in enumerate(part)
        ]
        (directory / f"{name}.json").write_text(json.dumps(rows))
    moe = make_toy("deepseek_v3", directory / "moe", num_hidden_layers=2, num_mtp_layers=0)
    files = {p.stem: p for p in directory.glob("*.json*")}
    return {**files, "toy": toy_llama, "moe": moe, "cache": directory / "cache"}


@pytest.fixture(scope="module")
def outcomes(places, tmp_path_factory):
    """By case: what each rank says of the whole run, of each half (the second in new processes); what was saved."""
    found = {}
    saved = {name: tmp_path_factory.mktemp("saved") for name in CASES}
    for processes in sorted({case.processes for case in CASES.values()}):
        cases = {name: case for name, case in CASES.items() if case.processes == processes}
        first = Pool(processes)
        for name, case in cases.items():
            words, cache = f"{case.words.format(**places)} {case.layout}", str(places["cache"])
            whole = first.run(run, case.door, words, cache)
            half = first.run(run, case.door, f"{words} --save {saved[name]} --exit-interval {STOP}", cache)
            found[name] = [whole, half]
        first.close()
        second = Pool(processes)
        for name, case in cases.items():
            found[name].append(second.run(run, case.door, f"--load {saved[name]} {case.layout}", str(places["cache"])))
        second.close()
        for name in cases:
            found[name].append(saved[name])
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_is_the_run_that_was_never_stopped(outcomes, name):
    whole, half, rest, _ = outcomes[name]
    for rank in range(CASES[name].processes):
        (steps, read), (first_steps, first_read), (last_steps, last_read) = whole[rank], half[rank], rest[rank]
        assert first_steps + last_steps == steps
        assert len(last_read) == len(read) // 2 and first_read + last_read == read
    assert len(whole[-1][0]) == ITERATIONS
    assert len({loss for loss, *_ in whole[-1][0]}) == ITERATIONS


def test_the_launcher_continues_what_a_pool_has_saved(outcomes, places):
    """The door of the command line, by torchrun, in processes that know nothing of this one."""
    name = "data, distributed optimizer"
    words = f"--load {outcomes[name][3]} {CASES[name].layout} --num-threads 1 --progress lines"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "MINDSPEED_LLM_CACHE": str(places["cache"]), "MINDSPEED_LLM_DEVICE": "cpu"}
    done = subprocess.run(
        [*command, str(ROOT / "posttrain_gpt.py"), *words.split()],
        env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = [line.split("lm loss: ")[1].split(" ")[0] for line in done.stdout.splitlines() if "lm loss: " in line]
    expected = [f"{float.fromhex(loss):.6E}" for loss, *_ in outcomes[name][0][-1][0][STOP:]]
    assert said[: ITERATIONS - STOP] == expected


def test_the_epochs_end_in_the_middle_of_a_batch(outcomes):
    """Or crossing their ends would not have been looked at."""
    for name in CASES:
        read = [row for _, rows in outcomes[name][0] for row in rows]
        first_epoch = [row for row in read if "epoch" not in row or " in epoch 0 " in row]
        assert len(set(first_epoch)) < len(read), name
    read = outcomes["sft, accumulated"][0][0][1]
    assert len(set(read)) % 4 and len(set(read[: 4 * STOP])) < 4 * STOP
