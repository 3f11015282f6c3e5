"""The text of the package: sizes, docstrings, no leftovers."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[3] / "mindspeed_llm"
FILES = sorted({p.resolve() for folder in (PACKAGE, PACKAGE / "patches") for p in folder.rglob("*.py")})
LONGEST_FILE = 500


PROTOCOL = PACKAGE / "accelerator" / "protocol.py"


def documented_methods(source):
    """Names of the methods that a module's classes document."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    return {node.name for node in functions if ast.get_docstring(node)}


def undocumented(source, elsewhere=frozenset()):
    """Public modules, classes, functions and methods without a docstring, by dotted name.

    Methods of derived classes may rely on the base's, and those named in `elsewhere` on a protocol's.
    """
    tree = ast.parse(source)
    missing = [] if ast.get_docstring(tree) or not tree.body else ["the module"]

    def visit(node, path):
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if child.name.startswith("_"):
                continue
            inherited = isinstance(node, ast.ClassDef) and bool(node.bases)
            inherited |= isinstance(node, ast.ClassDef) and child.name in elsewhere
            if ast.get_docstring(child) is None and not inherited:
                missing.append(".".join([*path, child.name]))
            if isinstance(child, ast.ClassDef):
                visit(child, [*path, child.name])

    visit(tree, [])
    return missing


def test_every_public_name_has_a_docstring():
    protocol = documented_methods(PROTOCOL.read_text())
    found = {}
    for file in FILES:
        elsewhere = protocol if file.parent == PROTOCOL.parent else frozenset()
        if names := undocumented(file.read_text(), elsewhere):
            found[str(file)] = names
    assert found == {}


def test_missing_docstrings_are_noticed():
    source = '"""M."""\nclass A:\n    """A."""\n    def b(self): pass\n    def _c(self): pass\ndef d(): pass\n'
    assert undocumented(source) == ["A.b", "d"]


def test_files_are_short():
    assert {str(f): n for f in FILES if (n := len(f.read_text().splitlines())) > LONGEST_FILE} == {}


@pytest.mark.parametrize("word", ["TO" + "DO", "FIX" + "ME", "XX" + "X"])
def test_nothing_is_left_for_later(word):
    # "iter_XXXXXXX" is how a directory name is written down
    pattern = re.compile(rf"(?<![A-Za-z_]){word}(?![A-Za-z])")
    assert [str(file) for file in FILES if pattern.search(file.read_text())] == []


def test_the_package_was_read():
    assert len(FILES) > 100
    assert any("patches" in file.parts for file in FILES)
