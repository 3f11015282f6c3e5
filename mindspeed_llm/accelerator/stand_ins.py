"""Answering `import X` in chosen modules by a module of another name, also where that import has failed already.

megatron asks at import whether optional packages are there (`try: import transformer_engine ... HAVE_TE = True`) and
defines classes by the answer. A module that asked before the stand-in was provided is made to ask again: those of its
top-level statements that depend on the answer are run anew in its namespace, and names of other modules bound to what
changed are rebound. Everything is recorded and put back by `withdraw`.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_MISSING = object()

# Modules most of whose classes derive from the package: run anew as a whole.
_WHOLE = ("megatron.core.extensions.transformer_engine",)
# Beginnings of names that say whether a package was found; top-level assignments and `if` statements have them.
_ASKED = ("HAVE_TE", "HAVE_APEX_OR_TE", "is_te_min_version")
# What a module caches about a package, to be forgotten with the stand-in.
_CACHES = (("megatron.core.utils", "_te_version"),)


class StandIns:
    """Names of packages that are not installed, and the modules that answer for them."""

    def __init__(
        self,
        modules: Mapping[str, str],
        namespace: Mapping[str, Any],
        only: Mapping[str, Sequence[str]] | None = None,
        hidden: frozenset[str] = frozenset(),
    ):
        """Args:
        modules: name of a package -> dotted name of the module that answers; packages that exist are left out,
            unless they are `hidden`.
        namespace: `__builtins__` that modules run anew see.
        only: for some packages, the modules that are answered; any other is told that the package is absent.
        """
        self._only = dict(only or {})
        self.modules = {
            name: target for name, target in modules.items() if name in hidden or importlib.util.find_spec(name) is None
        }
        self._namespace = namespace
        self._changed: list[tuple[types.ModuleType, str, Any]] = []
        self._asked: set[str] = set()

    def find(self, name: str, fromlist: Sequence[str] | None, caller: str) -> types.ModuleType | None:
        """What `__import__(name, fromlist)` answers in the module `caller`; None for a name that is not stood in for.

        Raises:
            ModuleNotFoundError: the package is stood in for and has no such submodule.
        """
        root, _, rest = name.partition(".")
        if root not in self.modules or caller not in self._only.get(root, (caller,)):
            return None
        target = ".".join(filter(None, (self.modules[root], rest)))
        try:
            module = importlib.import_module(target)
            for part in fromlist or ():
                if not hasattr(module, part) and importlib.util.find_spec(f"{target}.{part}") is not None:
                    importlib.import_module(f"{target}.{part}")
        except ModuleNotFoundError as error:
            if error.name is None or not error.name.startswith(self.modules[root]):
                raise
            raise ModuleNotFoundError(f"No module named {name!r}", name=name) from None
        return module if fromlist else importlib.import_module(self.modules[root])

    def version(self, distribution: str) -> str | None:
        """The version that the stand-in for a distribution says is its own; None where nothing stands in, or says."""
        target = self.modules.get(re.sub(r"[-_.]+", "_", distribution).lower())
        return None if target is None else getattr(importlib.import_module(target), "__version__", None)

    def ask_again(self, members: Callable[[], list[types.ModuleType]]) -> None:
        """Make the modules that `members` lists, loaded already, ask for the packages again."""
        self._members = members
        loaded = members()
        self._asked = {module.__name__ for module in loaded}
        if self.modules:
            self._run_anew(loaded, tuple(self.modules))

    def _run_anew(self, loaded: list[types.ModuleType], packages: tuple[str, ...]) -> None:
        for module, name in _CACHES:
            if hasattr(sys.modules.get(module), name):
                setattr(sys.modules[module], name, None)
        replaced: dict[int, tuple[Any, Any]] = {}
        loaded = sorted(loaded, key=lambda module: module.__name__ not in _WHOLE)
        changed: set[str] = set()
        trees = {module.__name__: (module, _parse(module)) for module in loaded}
        again = True
        while again:
            again = False
            for name, (module, tree) in list(trees.items()):
                statements = _statements(tree, packages, changed, name in _WHOLE and name not in changed)
                try:
                    renamed = self._run(module, statements, replaced)
                except ModuleNotFoundError as error:
                    if error.name not in packages:
                        raise
                    _forget(module)  # it was loaded thanks to what stood in, and is not without it
                    del trees[name]
                    continue
                if renamed:
                    again = again or name not in changed
                    changed.add(name)
        self._rebind(loaded, replaced)

    def _run(
        self, module: types.ModuleType, statements: list[ast.stmt], replaced: dict[int, tuple[Any, Any]]
    ) -> list[str]:
        """Run statements in a module's namespace; the names whose value became another."""
        if not statements:
            return []
        names = vars(module)
        before = dict(names)
        code = compile(ast.Module(statements, []), module.__file__ or module.__name__, "exec")
        builtins_before = names.get("__builtins__")
        names["__builtins__"] = self._namespace
        try:
            exec(code, names)  # the module's own statements
        finally:
            names["__builtins__"] = builtins_before
        changed = [
            name
            for name, value in list(names.items())
            if not name.startswith("__") and value is not before.get(name, _MISSING)
        ]
        for name in changed:
            old = before.get(name, _MISSING)
            self._changed.append((module, name, old))
            # Classes that megatron derives from a mock of an absent package are mocks, not classes.
            if _is_redefined(old, names[name]) or (module.__name__ in _WHOLE and callable(old)):
                replaced[id(old)] = (old, names[name])
        return changed

    def _rebind(self, loaded: list[types.ModuleType], replaced: dict[int, tuple[Any, Any]]) -> None:
        for module in loaded:
            for name, value in list(vars(module).items()):
                if not name.startswith("__") and id(value) in replaced and replaced[id(value)][0] is value:
                    self._changed.append((module, name, value))
                    setattr(module, name, replaced[id(value)][1])

    def withdraw(self) -> None:
        """Give every module back what it had; those loaded meanwhile ask again and find the packages absent."""
        for module, name, value in reversed(self._changed):
            if value is not _MISSING:
                setattr(module, name, value)
            elif name in vars(module):
                delattr(module, name)
        packages, self.modules = tuple(self.modules), {}
        if packages:
            later = [module for module in self._members() if module.__name__ not in self._asked]
            self._run_anew(later, packages)
        self._changed.clear()


def _forget(module: types.ModuleType) -> None:
    """Make an import of the module find it anew."""
    sys.modules.pop(module.__name__, None)
    parent, _, name = module.__name__.rpartition(".")
    if getattr(sys.modules.get(parent), name, None) is module:
        delattr(sys.modules[parent], name)


def _is_redefined(old: Any, new: Any) -> bool:
    """Whether both are what one definition made, before and after; a name that means something else now is neither."""
    if not all(isinstance(value, type | types.FunctionType) for value in (old, new)):
        return False
    return (old.__module__, old.__qualname__) == (new.__module__, new.__qualname__)


def _parse(module: types.ModuleType) -> list[ast.stmt]:
    try:
        return ast.parse(inspect.getsource(module)).body
    except (OSError, TypeError):  # an extension, or a package without a file
        return []


def _statements(tree: list[ast.stmt], packages: tuple[str, ...], changed: set[str], whole: bool) -> list[ast.stmt]:
    """The top-level statements to run again, in their order."""
    if whole:
        return [statement for statement in tree if not _is_future(statement)]
    return [statement for statement in tree if _depends(statement, packages, changed)]


def _is_future(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.ImportFrom) and statement.module == "__future__"


def _says_whether(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id.startswith(_ASKED)


def _depends(statement: ast.stmt, packages: tuple[str, ...], changed: set[str]) -> bool:
    """Whether a statement's outcome depends on a package, or on a module whose names changed."""
    if isinstance(statement, ast.If):
        return any(_says_whether(node) for node in ast.walk(statement.test))
    if isinstance(statement, ast.Assign):
        return all(_says_whether(target) for target in statement.targets)
    if not isinstance(statement, ast.Try | ast.ImportFrom | ast.Import):
        return False
    body = statement.body if isinstance(statement, ast.Try) else [statement]
    for node in (found for part in body for found in ast.walk(part)):
        named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            named = [node.module]
        if any(name.split(".")[0] in packages or name in changed for name in named):
            return True
    return False
