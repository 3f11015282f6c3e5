"""What patches meet in another version of a package, read from its files without importing them."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mindspeed_llm.patching.patch import Patch, fingerprint_of_source

SAME, CHANGED, MISSING = "same", "changed", "missing"


@dataclass(frozen=True)
class Drift:
    """How one patch's target looks in a version.

    Args:
        patch: the patch.
        state: `SAME` when its source is one the patch was written against, `CHANGED` or `MISSING`.
        found: fingerprint of the source there, None where it is missing.
        difference: a unified diff from the reference version to this one, empty where it is the same.
    """

    patch: Patch
    state: str
    found: str | None
    difference: str = ""

    @property
    def summary(self) -> str:
        """Lines added and removed, like `+3 -1`; empty without a difference."""
        lines = [line for line in self.difference.splitlines() if not line.startswith(("+++", "---"))]
        added, removed = (sum(line.startswith(sign) for line in lines) for sign in "+-")
        return f"+{added} -{removed}" if lines else ""


def source_in(root: Path, patch: Patch) -> str | None:
    """The source text of a patch's target below `root`, the directory that holds the package; None where there is none.

    As `inspect.getsource` gives it: decorators included, indented as in its file.
    """
    stem = root.joinpath(*patch.module_name.split("."))
    file = next((path for path in (stem.with_suffix(".py"), stem / "__init__.py") if path.is_file()), None)
    if file is None:
        return None
    text = file.read_text()
    node = _find(ast.parse(text), patch.path)
    if node is None:
        return None
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return "\n".join(text.splitlines()[first - 1 : node.end_lineno])


def _find(tree: ast.AST, path: Sequence[str]) -> ast.FunctionDef | ast.ClassDef | None:
    """The definition at a dotted path; of several under one name (in `if` and `try`) the first."""
    node: ast.AST | None = tree
    for name in path:
        definitions = (
            found
            for found in _children(node)
            if isinstance(found, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and found.name == name
        )
        node = next(definitions, None)
        if node is None:
            return None
    return node


def _children(node: ast.AST) -> list[ast.AST]:
    """Statements in the body of a module or class, those below `if` and `try` included."""
    found: list[ast.AST] = []
    for child in ast.iter_child_nodes(node):
        found.append(child)
        if isinstance(child, ast.If | ast.Try | ast.ExceptHandler):
            found += _children(child)
    return found


def drift(catalogue: Sequence[Patch], root: Path, reference: Path | None = None) -> list[Drift]:
    """How every target of a catalogue looks below `root`.

    Args:
        root: the directory that holds the package, e.g. a wheel that was unpacked.
        reference: where the version lies that differences are shown against; None shows none.
    """
    return [_drift_of(patch, root, reference) for patch in catalogue]


def has_needs(root: Path, patch: Patch) -> bool:
    """Whether the package that a patch needs is in the version below `root`.

    One of another distribution has no part in this: the target's file lies there with it or without.
    """
    needs = patch.needs.split(".")
    return needs[0] != patch.module_name.split(".")[0] or root.joinpath(*needs).is_dir()


def _drift_of(patch: Patch, root: Path, reference: Path | None) -> Drift:
    there = source_in(root, patch)
    if there is None:
        return Drift(patch, MISSING, None)
    found = fingerprint_of_source(there)
    if found in patch.fingerprints.values():
        return Drift(patch, SAME, found)
    here = None if reference is None else source_in(reference, patch)
    lines = (
        [] if here is None else difflib.unified_diff(here.splitlines(), there.splitlines(), "known", "found", "", "", 1)
    )
    return Drift(patch, CHANGED, found, "\n".join(line.rstrip("\n") for line in lines))
