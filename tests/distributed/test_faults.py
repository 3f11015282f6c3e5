"""Faults, injected into runs with dropout on packed rows: no checkpoint is lost, runs recover without hands, and what
they compute is bitwise what an undisturbed run computes.

Every rank is a process of its own that really dies. The whole sweep is benchmarks/faults.py.
"""

import os
import shutil
import subprocess
import sys

import pytest

from mindspeed_llm.checkpoint.directory import find_newest, iterations
from mindspeed_llm.checkpoint.manifest import changed_file
from mindspeed_llm.testing import faults as runs
from mindspeed_llm.testing.faults import Fault
from mindspeed_llm.testing.launcher import Launcher

TP, PP, SPREAD = "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2", "--use-distributed-optimizer"
FAULTS = [
    Fault("a rank is killed", "kill", resumes_at=3, says="rank 1 on "),
    Fault("the first rank is killed", "kill", rank=0, resumes_at=3, says="its process "),
    Fault("killed between two iterations' weights", "kill_in_update", rank=0, resumes_at=4),
    Fault("killed when the others begin to update", "kill_before_update", rank=0, resumes_at=4),
    Fault("a rank raises", "raises", resumes_at=3, says="rank 1 | reading shard 7"),
    Fault("a rank raises, optimizer spread", "raises", flags=SPREAD, resumes_at=3, says="OSError: storage is gone"),
    Fault("a rank is killed, optimizer spread", "kill", at="5", flags=f"{SPREAD} --save-interval 2", resumes_at=4,
          says="parts of the optimizer's state"),
    Fault("a rank raises, fully sharded", "raises", flags="--use-torch-fsdp2 --bf16", resumes_at=3,
          says="OSError: storage is gone"),
    Fault("a rank sleeps", "sleeps", flags="--hang-timeout 3", resumes_at=3, says="held_up_by_storage"),
    Fault("adapters, a rank is killed", "kill", flags="--lora-r 4 --lora-alpha 8", resumes_at=3),
    Fault("two tensor-parallel pairs, one killed", "kill", rank=3, ranks=4, flags=TP, resumes_at=3),
    Fault("two pipelines, the first rank killed", "kill", rank=0, ranks=4, flags=PP, resumes_at=3),
    Fault("killed while its part is written", "kill_in_save", at="writing:2", flags="--save-interval 2", resumes_at=4),
    Fault("first rank killed while it names", "kill_in_save", at="renamed:2", rank=0, flags="--save-interval 2"),
    Fault("killed while saving beside training", "kill_in_save", at="writing:2",
          flags="--save-interval 2 --async-save"),
    Fault("alone, killed before the index", "kill_in_save", at="written:2", rank=0, ranks=1,
          flags="--save-interval 2", resumes_at=2),
    Fault("alone, killed before the new name", "kill_in_save", at="listed:2", rank=0, ranks=1,
          flags="--save-interval 2 --async-save", resumes_at=2),
    Fault("alone, killed before the tracker moves", "kill_in_save", at="renamed:2", rank=0, ranks=1,
          flags="--save-interval 2"),
    Fault("SIGTERM to one rank", "asked_to_stop", flags="--auto-resume", again=True, resumes_at=4,
          says="stopped after iteration 4", environment={"FAULT_SIGNAL": "SIGTERM"}),
    Fault("SIGUSR1 to the first rank", "asked_to_stop", flags="--auto-resume", again=True, resumes_at=4, rank=0,
          says="stopped after iteration 4 by SIGUSR1", environment={"FAULT_SIGNAL": "SIGUSR1"}),
]  # fmt: skip


@pytest.fixture(scope="module")
def launcher():
    with Launcher() as started:
        yield started


@pytest.fixture(scope="module")
def table(request):
    lines = []
    yield lines
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        print("", *lines, sep="\n")


@pytest.fixture(scope="module")
def words(toy_llama, tmp_path_factory):
    rows = runs.write_rows(tmp_path_factory.mktemp("rows") / "rows.json")
    return f"--load {toy_llama} --data-path {rows}", rows.with_name("cache")


@pytest.fixture(scope="module")
def undisturbed(launcher, words, tmp_path_factory):
    """layout -> losses by iteration of a run in which nothing happens, and the directory of its checkpoints."""
    known = {}

    def of(fault):
        if fault.layout not in known:
            out = tmp_path_factory.mktemp("undisturbed") / "out"
            ranks, flags = fault.layout
            quiet = Fault("nothing", "", ranks=ranks, flags=f"{flags} --save-interval 2")
            found = runs.run_fault(launcher, quiet, words[0], out, words[1])
            assert found.job.status == 0, found.said[-3000:]
            assert sorted(found.losses) == list(range(1, runs.ITERATIONS + 1))
            known[fault.layout] = found.losses, out
        return known[fault.layout]

    return of


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_run_survives(launcher, words, undisturbed, table, tmp_path, fault):
    found = runs.run_fault(launcher, fault, words[0], tmp_path / "out", words[1])
    table.append(runs.table_line(fault, found))
    wrong = runs.problems(fault, found, undisturbed(fault)[0])
    assert not wrong, "\n".join([*wrong, found.said[-6000:]])
    if "--save-interval" not in fault.flags:
        assert found.lost <= 1


def test_the_comparison_notices_another_course(launcher, words, undisturbed, tmp_path):
    fault = Fault("another seed", "", flags="--seed 7")
    found = runs.run_fault(launcher, fault, words[0], tmp_path / "out", words[1])
    wrong = runs.problems(fault, found, undisturbed(FAULTS[0])[0])
    assert any("differ from" in line for line in wrong) and any("starts at [0]" in line for line in wrong)


@pytest.mark.parametrize("how", ["truncated", "flipped", "missing"])
def test_damage_to_a_file_of_any_kind_is_seen(undisturbed, table, tmp_path, how):
    _, whole = undisturbed(FAULTS[0])
    newest = find_newest(whole)
    files = sorted(p.relative_to(newest) for p in newest.rglob("*") if p.is_file())
    kinds = {(p.parent, p.suffix or p.name): p for p in files}
    assert len(kinds) >= 5
    for file in kinds.values():
        root = tmp_path / "copy"
        shutil.copytree(whole, root)
        hurt = root / newest.name / file
        content = bytearray(hurt.read_bytes())
        if how == "missing":
            hurt.unlink()
        else:
            content[len(content) // 2] ^= 1
            hurt.write_bytes(content if how == "flipped" else content[:-1])
        skipped = []
        found = find_newest(root, skipped=skipped)
        if how == "flipped" and found.name == newest.name:
            assert str(file) in changed_file(found), file
        else:
            assert found.name == "iter_0000004" and len(iterations(root)) == 3, (file, skipped)
            assert newest.name in skipped[0], skipped
        shutil.rmtree(root)
    table.append(f"{how} files of {len(kinds)} kinds: all refused by name, the checkpoint before is found")


def test_a_damaged_checkpoint_is_passed_over_and_the_run_goes_on_from_the_one_before(
    launcher, words, undisturbed, table, tmp_path
):
    losses, whole = undisturbed(FAULTS[0])
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    part = next((out / "iter_0000006").glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:-100])
    fault = Fault("truncated newest checkpoint", "", flags="--auto-resume")
    found = runs.run_fault(launcher, fault, words[0], out, words[1])
    table.append(runs.table_line(fault, found))
    assert found.job.status == 0 and found.resumed == [0, 4] and not found.differing, found.said[-3000:]
    assert found.losses == losses and part.name in found.said


def test_a_full_disk_leaves_the_checkpoint_before(launcher, words, table, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    how = "full_disk" if mounted.returncode == 0 else "file_limit"
    fault = Fault(f"disk is full ({how})", how, at="begun:2", rank=0, flags="--save-interval 2")
    try:
        found = runs.run_fault(launcher, fault, words[0], disk / "out", words[1])
        table.append(f"{fault.name:<44} {fault.ranks} ranks  newest is {found.newest}, {len(found.job.starts)} starts")
        assert found.job.status == 1 and found.newest == 2 + 2 * (how == "full_disk" and found.newest == 4)
        assert "save: iter_000000" in found.said and "is intact" in found.said
        assert changed_file(find_newest(disk / "out")) is None
        assert not list((disk / "out").glob("*.tmp"))
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "-l", str(disk)], check=True)


def test_torchrun_starts_a_killed_run_again(words, undisturbed, table, tmp_path):
    fault, out = FAULTS[0], tmp_path / "out"
    launch = f"-m torch.distributed.run --standalone --nproc-per-node 2 --max-restarts 1 {runs.DOOR} posttrain"
    told = {"FAULT": "kill", "FAULT_RANK": "1", "FAULT_AT": "3", "FAULT_ONCE": str(tmp_path / "once")}
    environment = {**os.environ, **told, "MINDSPEED_LLM_DEVICE": "cpu", "MINDSPEED_LLM_CACHE": str(words[1])}
    command = [sys.executable, *f"{launch} {runs.FLAGS} {words[0]} --save {out}".split()]
    log = tmp_path / "log"
    with log.open("w") as file:
        status = subprocess.run(command, env=environment, stdout=file, stderr=file, timeout=300, check=False).returncode
    found = runs.outcome(runs.Job(status, [], 0.0), out, log)
    table.append(f"a rank is killed under torchrun --max-restarts 1: resumed at {found.resumed[1:]}, lost {found.lost}")
    assert runs.problems(fault, found, undisturbed(fault)[0]) == [], found.said[-6000:]
    assert found.lost <= 1
