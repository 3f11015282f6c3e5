"""A place that cannot be written to is refused with the command line, in one line, by each door that writes there."""

import pytest

from mindspeed_llm.__main__ import main as small_tool
from mindspeed_llm.cli.places import unwritable_places
from mindspeed_llm.config.parser import parse
from mindspeed_llm.config.run import all_options
from mindspeed_llm.config.schema import DOORS

WRITTEN = [(door, o.name, o.writes) for o in all_options().values() if o.writes for door in DOORS if door in o.doors]


def places(door, name, path):
    return unwritable_places(parse(door, ["--" + name.replace("_", "-"), str(path)]).config)


def test_every_door_that_writes_is_here():
    assert {door for door, _, _ in WRITTEN} == set(DOORS)


@pytest.mark.parametrize("door, name, kind", WRITTEN)
def test_a_file_is_no_directory(door, name, kind, tmp_path):
    (tmp_path / "file").write_text("kept")
    flag = "--" + name.replace("_", "-")
    (said,) = places(door, name, tmp_path / "file" / "below" / "x")
    assert said.startswith(f"{flag}: {tmp_path}/file/below") and "cannot be written to" in said and "\n" not in said
    assert places(door, name, tmp_path / "new" / "below" / "x") == []
    assert len(places(door, name, tmp_path / "file")) == (kind == "directory")
    assert len(places(door, name, tmp_path)) == (kind == "file")
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("door, name", [("convert", "save_dir"), ("preprocess", "output_prefix")])
def test_the_doors_say_it(door, name, tmp_path, capsys):
    import importlib

    (tmp_path / "file").write_text("")
    flag = "--" + name.replace("_", "-")
    assert importlib.import_module(f"mindspeed_llm.cli.{door}").main([flag, str(tmp_path / "file" / "below")]) == 1
    assert f"error: {flag}: {tmp_path}/file" in capsys.readouterr().err


def test_a_toy_says_it(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert small_tool(["models", "toy", "llama", str(tmp_path / "file")]) == 1
    assert f"error: directory: {tmp_path}/file cannot be written to" in capsys.readouterr().err
