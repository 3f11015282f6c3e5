"""Room on the volume of a save, and whether it can be written to at all."""

import os

import pytest

from mindspeed_llm.checkpoint import space
from mindspeed_llm.errors import UserError


def test_the_volume_is_that_of_the_nearest_directory_that_exists(tmp_path):
    assert space.nearest_existing(tmp_path / "not" / "yet") == tmp_path
    assert space.free_bytes(tmp_path / "not" / "yet") == space.free_bytes(tmp_path) > 0


def test_too_little_room_is_said_with_the_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(space, "free_bytes", lambda path: 3 * 2**30)
    assert space.space_problem(tmp_path, 3 * 2**30, "it") is None
    problem = space.space_problem(tmp_path, 5 * 2**30, "2 checkpoints of 2.5 GiB")
    assert "3 GiB" in problem and "5 GiB" in problem and "2 checkpoints of 2.5 GiB" in problem and "\n" not in problem


def test_a_volume_that_cannot_be_written_to_is_found_out_at_once(tmp_path):
    space.probe(tmp_path / "new" / "directory")
    assert list((tmp_path / "new" / "directory").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written to, because of: Not a directory"):
        space.probe(tmp_path / "file" / "below")


def test_a_place_that_does_not_exist_yet_is_tried_without_making_it(tmp_path):
    assert space.writing_problem(tmp_path / "new" / "directory") is None
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    for inside in (tmp_path / "file", tmp_path / "file" / "below", space.Path("/proc/new")):
        problem = space.writing_problem(inside)
        assert problem.startswith(f"--save: {inside} cannot be written to") and "\n" not in problem
        with pytest.raises(UserError, match=f"--save: {inside} cannot be written to"):
            space.probe(inside)


def test_a_quota_is_named(tmp_path, monkeypatch):
    import errno

    def full(descriptor):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="the quota is used up"):
        space.probe(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "num_bytes, text", [(0, "0 B"), (1536, "1.5 KiB"), (3.25 * 2**30, "3.25 GiB"), (2**50, "1,024.0 TiB")]
)
def test_sizes_are_said_in_units(num_bytes, text):
    assert space.in_units(num_bytes) == text
