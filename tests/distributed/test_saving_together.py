"""Ranks agree about saving and loading: whose clock counts, who finds damage, who refuses."""

import os
import pydoc_data.topics

import pytest

from mindspeed_llm.errors import UserError
from mindspeed_llm.testing.pool import pool

FLAGS = (
    "--seq-length 64 --lr 1e-2 --global-batch-size 4 --split 1 --eval-iters 0 --num-threads 1 --progress lines "
    "--train-iters 6"
)


def train(words, cache, seconds=0.0, free=2**50):
    """One run on this rank, whose clock ticks `seconds` at a look; its losses (on the last rank) or the refusal."""
    import torch.distributed as dist

    from mindspeed_llm.checkpoint import space
    from mindspeed_llm.cli.training import run_door
    from mindspeed_llm.config.parser import parse
    from mindspeed_llm.training.saving import SaveSchedule

    rank, world = dist.get_rank(), dist.get_world_size()
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)})
    os.environ["MINDSPEED_LLM_CACHE"] = cache
    looks = iter(range(10**6))
    before = SaveSchedule.__init__.__defaults__, space.free_bytes
    # Clocks of hosts disagree: the first rank's goes at its own speed, the others stand still.
    SaveSchedule.__init__.__defaults__ = (lambda: next(looks) * (seconds if rank == 0 else 0.0),)
    space.free_bytes = lambda path: free
    try:
        result = run_door(parse("pretrain", f"{FLAGS} {words}".split()))
    except UserError as refused:
        return str(refused)
    finally:
        SaveSchedule.__init__.__defaults__, space.free_bytes = before
    return [loss for _, loss in result.history.train]


@pytest.fixture(scope="module")
def words(toy_llama, tmp_path_factory):
    import json

    directory = tmp_path_factory.mktemp("texts")
    topics = pydoc_data.topics.topics
    text = "".join(json.dumps({"text": topics[name][:900]}) + "\n" for name in sorted(topics)[:40])
    (directory / "text.jsonl").write_text(text)
    return f"--data-path {directory / 'text.jsonl'} --load {toy_llama}", str(directory / "cache")


@pytest.fixture(scope="module")
def saved(words, tmp_path_factory):
    """(directory with iterations 2, 4 and 6 of two ranks, losses)."""
    out = tmp_path_factory.mktemp("saved") / "out"
    found = pool(2).run(train, f"{words[0]} --save {out} --save-interval 2", words[1])
    return out, found[-1]


def test_all_ranks_save_by_the_first_ranks_clock(words, tmp_path):
    out = tmp_path / "out"
    pool(2).run(train, f"{words[0]} --save {out} --save-interval 1.5m", words[1], 40.0)
    saved_at = [int(path.name[5:]) for path in sorted(out.glob("iter_*"))]
    assert saved_at and saved_at[-1] == 6 and 1 < len(saved_at) < 6


def test_all_ranks_leave_when_the_first_ranks_time_is_up(words, tmp_path):
    out = tmp_path / "out"
    found = pool(2).run(train, f"{words[0]} --save {out} --exit-duration-in-mins 2", words[1], 40.0)
    assert 1 < len(found[-1]) < 6 and len(list(out.glob("iter_*"))) == 1


def test_ranks_share_the_checksums_and_pass_over_the_same(saved, words, tmp_path):
    import shutil

    for name in ("__0_0.distcp", "__1_0.distcp", "mindspeed_llm.json", "common.pt"):
        out = shutil.copytree(saved[0], tmp_path / name)
        file = out / "iter_0000006" / name
        data = bytearray(file.read_bytes())
        position = data.index(b'"version"') + 2 if name == "mindspeed_llm.json" else len(data) // 2
        data[position] ^= 1
        file.write_bytes(bytes(data))
        found = pool(2).run(train, f"{words[0].split(' --load')[0]} --load {out} --save {out}", words[1])
        assert found[-1] == saved[1][4:], name


def test_all_ranks_refuse_for_want_of_room(words, tmp_path):
    found = pool(2).run(train, f"{words[0]} --save {tmp_path / 'out'}", words[1], 0.0, 2**20)
    assert len(set(found)) == 1 and "too little room, 1 MiB" in found[0]
