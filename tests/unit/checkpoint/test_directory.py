"""Directories of checkpoints: complete or ignored, whatever ends a save, and never the last good one lost."""

import errno
import json
import os
import resource
import signal
import threading
from contextlib import suppress

import pytest

from mindspeed_llm.checkpoint import directory
from mindspeed_llm.checkpoint.directory import (
    STAGES,
    aside_of,
    begin,
    complete,
    discarding,
    find_newest,
    is_complete,
    iterations,
    mark_health,
    prune,
    reached,
)
from mindspeed_llm.checkpoint.manifest import changed_file, damage
from mindspeed_llm.checkpoint.train_record import iteration_directory, read_tracker, write_record, write_tracker
from mindspeed_llm.errors import UserError

WEIGHTS = "__0_0.distcp"


class Killed(BaseException):
    """What a process sees of kill -9: nothing after it is executed."""


@pytest.fixture
def ending():
    """ending(stage): the next save ends when it has passed that stage."""

    def at(stage):
        def end(passed):
            if passed == stage:
                raise Killed(stage)

        directory.observers.append(end)

    yield at
    directory.observers.clear()


def save(root, iteration, content="weights", record=None, **more):
    """All stages of a save, on files that stand for a checkpoint's."""
    aside = begin(root, iteration)
    (aside / WEIGHTS).write_text(content[: len(content) // 2])
    reached("writing")
    (aside / WEIGHTS).write_text(content)
    reached("written")
    (aside / ".metadata").write_text("index")
    (aside / "hf").mkdir()
    (aside / "hf" / "config.json").write_text("{}")
    reached("indexed")
    write_record(aside, {"iteration": iteration, **(record or {})})
    return complete(aside, iteration, **more)


def content_of(root):
    """What a resume would read."""
    return (find_newest(root) / WEIGHTS).read_text()


def test_a_save_passes_all_stages_in_order(tmp_path):
    passed = []
    directory.observers.append(passed.append)
    try:
        final = save(tmp_path, 3)
    finally:
        directory.observers.remove(passed.append)
    assert tuple(passed) == STAGES
    assert is_complete(final) and read_tracker(tmp_path) == "3" and find_newest(tmp_path) == final
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iter_0000003", "latest_checkpointed_iteration.txt"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_save_that_ends_anywhere_leaves_a_checkpoint(tmp_path, ending, stage):
    save(tmp_path, 9, "nine")
    ending(stage)
    with pytest.raises(Killed):
        save(tmp_path, 10, "ten")
    # From "tracked" on the new one counts; before it the old one does.
    assert content_of(tmp_path) == ("ten" if stage in ("tracked", "pruned") else "nine")
    assert all(is_complete(path) for path in iterations(tmp_path).values())
    directory.observers.clear()
    save(tmp_path, 11, "eleven")
    assert content_of(tmp_path) == "eleven"
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob("*.old"))


@pytest.mark.parametrize("stage", STAGES)
def test_saving_an_iteration_again_never_loses_it(tmp_path, ending, stage):
    save(tmp_path, 10, "first")
    ending(stage)
    with pytest.raises(Killed):
        save(tmp_path, 10, "second")
    renamed = stage in ("renamed", "tracked", "pruned")
    assert content_of(tmp_path) == ("second" if renamed else "first")
    directory.observers.clear()
    save(tmp_path, 12, "twelve")
    assert (iteration_directory(tmp_path, 10) / WEIGHTS).read_text() == ("second" if renamed else "first")
    assert not list(tmp_path.glob("*.old"))


@pytest.mark.parametrize("stage", STAGES)
def test_the_first_save_of_a_run_is_there_or_not_at_all(tmp_path, ending, stage):
    ending(stage)
    with pytest.raises(Killed):
        save(tmp_path, 1, "one")
    found = find_newest(tmp_path)
    if stage in ("renamed", "tracked", "pruned"):
        assert is_complete(found) and content_of(tmp_path) == "one"
    else:
        assert found is None


def test_the_old_order_of_things_would_be_noticed(tmp_path, ending, monkeypatch):
    """Negative control: removing the former checkpoint before the new one has its name loses it."""
    import shutil

    def swap_badly(aside, final, between):
        shutil.rmtree(final)
        between()
        os.replace(aside, final)

    save(tmp_path, 10, "first")
    monkeypatch.setattr(directory, "swap_in", swap_badly)
    ending("set_aside")
    with pytest.raises(Killed):
        save(tmp_path, 10, "second")
    assert find_newest(tmp_path) is None


def damaged(root, number, how):
    """Damage one checkpoint; what a message must name."""
    target = iteration_directory(root, number)
    if how == "truncated":
        (target / WEIGHTS).write_text("w")
        return WEIGHTS
    if how == "missing":
        (target / "hf" / "config.json").unlink()
        return "hf/config.json"
    if how == "no manifest":
        (target / "manifest.json").unlink()
        return "manifest.json"
    if how == "half a manifest":
        (target / "manifest.json").write_text((target / "manifest.json").read_text()[:40])
        return "manifest.json"
    if how == "half a record":
        (target / "mindspeed_llm.json").write_text("{")
        return "mindspeed_llm.json"
    import shutil

    shutil.rmtree(target)
    return target.name


@pytest.mark.parametrize(
    "how", ["truncated", "missing", "no manifest", "half a manifest", "half a record", "not there at all"]
)
def test_the_newest_complete_one_is_found_and_the_damage_is_named(tmp_path, how):
    for number in (8, 9, 10):
        save(tmp_path, number, f"content {number}")
    name = damaged(tmp_path, 10, how)
    skipped = []
    assert find_newest(tmp_path, skipped=skipped) == iteration_directory(tmp_path, 9)
    assert len(skipped) == 1 and "iter_0000010" in skipped[0] and name in skipped[0]


def test_a_flipped_bit_has_the_right_size_and_the_wrong_checksum(tmp_path):
    final = save(tmp_path, 1, "x" * 1000)
    data = bytearray((final / WEIGHTS).read_bytes())
    data[500] ^= 1
    (final / WEIGHTS).write_bytes(bytes(data))
    assert damage(final) is None
    assert WEIGHTS in changed_file(final)
    assert changed_file(final, ["mindspeed_llm.json"]) is None


def test_younger_ones_of_a_course_that_was_given_up_come_last(tmp_path):
    for number in (5, 10, 15):
        save(tmp_path, number)
    write_tracker(tmp_path, 10)
    damaged(tmp_path, 10, "truncated")
    assert find_newest(tmp_path).name == "iter_0000005"
    damaged(tmp_path, 5, "truncated")
    assert find_newest(tmp_path).name == "iter_0000015"


def test_foreign_checkpoints_are_loaded_by_the_tracker_alone(tmp_path):
    save(tmp_path, 5)
    foreign = tmp_path / "iter_0000009"
    (foreign / "mp_rank_00").mkdir(parents=True)
    assert find_newest(tmp_path).name == "iter_0000005"
    write_tracker(tmp_path, 9)
    assert find_newest(tmp_path) == foreign and damage(foreign) is None and not is_complete(foreign)


def test_the_newest_healthy_one_can_be_asked_for(tmp_path):
    save(tmp_path, 1, record={"health": {"healthy": True, "reasons": []}})
    save(tmp_path, 2, record={"health": {"healthy": True, "reasons": []}})
    save(tmp_path, 3, record={"health": {"healthy": False, "reasons": ["loss spike"]}})
    save(tmp_path, 4)
    assert find_newest(tmp_path, healthy=True).name == "iter_0000002"
    mark_health(iteration_directory(tmp_path, 2), False, ["seen later"])
    assert find_newest(tmp_path, healthy=True).name == "iter_0000001"
    assert is_complete(iteration_directory(tmp_path, 2)), "a later verdict is no damage"
    assert find_newest(tmp_path).name == "iter_0000004"


def test_retention_counts_numbers_and_not_letters(tmp_path):
    for number in (8, 9, 10, 99_999_999, 100_000_000):
        save(tmp_path, number)
    removed = prune(tmp_path, 2)
    assert [path.name for path in removed] == ["iter_0000008", "iter_0000009", "iter_0000010"]
    assert list(iterations(tmp_path)) == [99_999_999, 100_000_000]


def test_retention_keeps_what_must_not_be_lost(tmp_path):
    healthy = {"health": {"healthy": True, "reasons": []}}
    for number in range(1, 9):
        save(tmp_path, number, record=healthy if number == 2 else None)
    write_tracker(tmp_path, 5)
    damaged(tmp_path, 3, "truncated")
    (tmp_path / "iter_0000004" / "manifest.json").unlink()
    (tmp_path / "iter_0000004" / "mindspeed_llm.json").unlink()
    prune(tmp_path, 1)
    kept = {5: "tracked", 8: "newest", 2: "healthy", 3: "damaged", 4: "foreign"}
    assert set(iterations(tmp_path)) == set(kept)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_a_run_keeps_as_many_as_asked(tmp_path, keep):
    for number in range(1, 7):
        save(tmp_path, number, keep_last=keep)
        assert list(iterations(tmp_path)) == list(range(max(1, number - keep + 1), number + 1))


def test_a_removal_that_is_interrupted_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    import shutil

    for number in (1, 2):
        save(tmp_path, number)

    def killed(*args, **kwargs):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        with pytest.raises(Killed):
            prune(tmp_path, 1)
    assert list(iterations(tmp_path)) == [2]
    save(tmp_path, 3)
    assert not list(tmp_path.glob("*.tmp"))


def test_what_is_read_back_from_the_disk_is_compared(tmp_path, monkeypatch):
    def forgetful_disk(aside):
        (aside / WEIGHTS).write_text("WEIGHTS")

    save(tmp_path, 1, read_back=True)
    monkeypatch.setattr(directory, "forget_cached", forgetful_disk)
    with pytest.raises(UserError, match=f"iter_0000002.*{WEIGHTS}"):
        save(tmp_path, 2, read_back=True)
    assert find_newest(tmp_path).name == "iter_0000001"
    save(tmp_path, 2)  # nobody asked, nobody looked


def test_a_writer_that_says_other_sums_than_it_wrote_is_noticed(tmp_path):
    from mindspeed_llm.checkpoint.checksum import FileSum

    with pytest.raises(UserError, match=WEIGHTS):
        save(tmp_path, 1, sums={WEIGHTS: FileSum(3, "0")})
    assert find_newest(tmp_path) is None


def test_unfinished_directories_are_never_loaded_and_go_with_the_next_save(tmp_path):
    save(tmp_path, 1)
    begin(tmp_path, 5)
    begin(tmp_path, 2, tidy=False)
    assert aside_of(tmp_path, 5).is_dir() and find_newest(tmp_path).name == "iter_0000001"
    save(tmp_path, 2)
    assert not aside_of(tmp_path, 5).exists()


def test_a_failing_disk_is_one_line_and_leaves_the_checkpoint_before(tmp_path):
    """A limit on the size of files stands for a full disk: the kernel refuses the write in the middle of it."""
    save(tmp_path, 1)
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    aside = aside_of(tmp_path, 2)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        with pytest.raises(UserError, match="iter_0000002 cannot be written.*File too large.*iter_0000001 is intact"):
            with discarding(aside):
                save(tmp_path, 2, "x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not aside.exists() and find_newest(tmp_path).name == "iter_0000001"


def test_what_is_given_up_is_gone_while_others_still_make_files_in_it(tmp_path):
    aside, made = begin(tmp_path, 2), []

    def keep_writing():
        with suppress(FileNotFoundError):
            while len(made) < 100_000:
                made.append(aside / f"late{len(made)}")
                made[-1].write_text("x")

    other = threading.Thread(target=keep_writing)
    with pytest.raises(UserError, match="iter_0000002 cannot be written"), discarding(aside):
        other.start()
        while len(made) < 10:
            pass
        raise OSError(errno.ENOSPC, "No space left on device")
    other.join()
    assert len(made) < 100_000 and not list(tmp_path.iterdir())


def test_the_manifest_lists_every_file_with_size_and_checksum(tmp_path):
    final = save(tmp_path, 1)
    manifest = json.loads((final / "manifest.json").read_text())
    assert set(manifest["files"]) == {WEIGHTS, ".metadata", "hf/config.json", "mindspeed_llm.json"}
    assert manifest["files"][WEIGHTS][0] == len("weights")
