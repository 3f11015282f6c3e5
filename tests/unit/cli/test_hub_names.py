"""Hub names in --load and --lora-load become directories before anything else starts."""

import pytest

from mindspeed_llm.cli.hub import download_models
from mindspeed_llm.config.parser import parse
from mindspeed_llm.errors import UserError


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What the hub was asked for; `owner/missing` is not there."""
    calls = []

    def resolve(name, hub):
        calls.append((name, hub))
        if name == "owner/missing":
            raise UserError("hub: owner/missing cannot be had; try: another")
        return tmp_path / name

    monkeypatch.setattr("mindspeed_llm.cli.hub.resolve_model", resolve)
    return calls


def config(*words):
    return parse("posttrain", words).config


def test_the_hub_is_the_one_asked_for(asked, tmp_path):
    problems = []
    for hub in ("hf", "modelscope"):
        found = config("--load", "owner/model", "--lora-load", "owner/adapter", "--hub", hub)
        download_models(found, problems)
        assert found.checkpoint.load == str(tmp_path / "owner/model")
        assert found.lora.lora_load == [str(tmp_path / "owner/adapter")]
    assert asked == [(name, hub) for hub in ("hf", "modelscope") for name in ("owner/model", "owner/adapter")]
    assert problems == []


def test_paths_are_left_alone(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ckpt" / "model").mkdir(parents=True)
    problems = []
    for words in (
        ["--load", "ckpt/model"],
        ["--load", "/nowhere/model"],
        ["--load", "./ckpt/other"],
        ["--load", "ckpt/new", "--save", "ckpt/new"],
    ):
        found = config(*words)
        download_models(found, problems)
        assert found.checkpoint.load == words[1]
    assert asked == [] and problems == []


def test_what_cannot_be_had_is_a_problem(asked):
    problems = []
    download_models(config("--load", "owner/missing"), problems)
    assert len(problems) == 1
    assert problems[0].startswith("--load: owner/missing is no directory here; hub: owner/missing cannot be had")
