"""docs/errors.md is complete and current, and every message says what it is about."""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[3] / "docs"
spec = importlib.util.spec_from_file_location("errors_generator", DOCS / "errors.py")
generator = importlib.util.module_from_spec(spec)
sys.modules["errors_generator"] = generator
spec.loader.exec_module(generator)

FOUND = generator.messages()


def test_the_page_is_current():
    assert (DOCS / "errors.md").read_text() == generator.markdown(), "run: python docs/errors.py > docs/errors.md"


def test_every_message_has_a_topic():
    assert [f"{m.place}: {m.text}" for m in FOUND if m.topic is None] == []


def test_every_topic_has_causes_and_every_cause_a_topic():
    topics = generator.causes()["topics"]
    assert {m.topic for m in FOUND} == set(topics)
    for entry in topics.values():
        assert entry["means"].endswith(".") and entry["causes"]


def test_files_without_topics_exist():
    for file in generator.causes()["files"]:
        assert any(m.place.startswith(f"{file}:") for m in FOUND), file


def read(source):
    return [(text, generator.topic_of(text, None)) for text, _ in generator.texts_of(ast.parse(source))]


@pytest.mark.parametrize(
    "source, expected",
    [
        ("raise UserError(f'it is {x.y[0]} of {f(x)}')", [("it is <y> of <...>", None)]),
        ("raise UserError('data: gone' + more)", [("data: gone<...>", "data")]),
        ("raise UserError(f'split: {x}; legal: 1')", [("split: <x>; legal: 1", "options")]),
        ("raise RuntimeError('loss: none')", [("loss: none", "loss")]),
        ("raise RuntimeError('a mistake of ours')", []),
        ("problems.append(f'--bf16: {x} is wrong')", [("--bf16: <x> is wrong", "options")]),
        ("words = ['--bf16', '--lr 1e-3', 'data: 3']", []),
        ("def f():\n    'The --lr is wrong; legal: 1.'", []),
    ],
)
def test_what_is_taken_for_a_message(source, expected):
    assert read(source) == expected
