"""Which modules of the process see the facade, and how they are loaded so that they do."""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import os
import sys
import types
import warnings
from collections.abc import Mapping
from typing import Any

# Warnings megatron gives at import about packages that are optional to it and replaced here.
_OPTIONAL_PACKAGE_WARNINGS = (
    r".*Apex is not installed.*",
    r".*Transformer Engine and Apex are not installed.*",
    r".*transformer_engine.*",
    r".*TransformerEngine.*",
)


class Members:
    """Which modules see the facade: those below a prefix, and those whose file lies in one of some directories."""

    def __init__(self) -> None:
        self.prefixes: tuple[str, ...] = ()
        self.directories: tuple[str, ...] = ()
        self._by_file: set[str] = set()
        self.names = functools.lru_cache(maxsize=None)(self._names)

    def add(self, prefixes: tuple[str, ...], directories: tuple[str, ...]) -> None:
        """More prefixes and directories."""
        self.prefixes = tuple(dict.fromkeys(self.prefixes + prefixes))
        self.directories = tuple(dict.fromkeys(self.directories + directories))
        self.names.cache_clear()

    def may_have(self, name: str) -> bool:
        """Whether a module of that name can be a member, its file being unknown."""
        return bool(self.directories) or self.names(name)

    def has(self, name: str, file: str | None) -> bool:
        """Whether a module of that name and file is one, which is remembered."""
        if self.names(name):
            return True
        if file is None or not any(file.startswith(directory + os.sep) for directory in self.directories):
            return False
        self._by_file.add(name)
        self.names.cache_clear()
        return True

    def loaded(self) -> list[types.ModuleType]:
        """The members that are loaded."""
        modules = [(name, module) for name, module in list(sys.modules.items()) if module is not None]
        return [module for name, module in modules if self.has(name, getattr(module, "__file__", None))]

    def _names(self, name: str) -> bool:
        return name in self._by_file or has_prefix(name, self.prefixes)


def has_prefix(name: str, prefixes: tuple[str, ...]) -> bool:
    """Whether module `name` is one of `prefixes` or lies below one."""
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


class _Loader(importlib.abc.Loader):
    """Runs a module with an `__import__` of its own, so that every `import torch` in it, at any depth, is answered."""

    def __init__(self, loader: importlib.abc.Loader, namespace: Mapping[str, Any]):
        self._loader = loader
        self._namespace = namespace

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__dict__["__builtins__"] = self._namespace
        # The loader a module carries afterwards is the one that found it (inspect and pickle-by-reference use it).
        module.__loader__ = module.__spec__.loader = self._loader
        with warnings.catch_warnings():
            for message in _OPTIONAL_PACKAGE_WARNINGS:
                warnings.filterwarnings("ignore", message=message)
            self._loader.exec_module(module)


class Finder(importlib.abc.MetaPathFinder):
    """Finds modules through the other finders, and wraps the loader of those that shall see the facade.

    Args:
        namespace: `__builtins__` of the modules it loads.
    """

    def __init__(self, members: Members, namespace: Mapping[str, Any]):
        self.members = members
        self._namespace = namespace

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if sys.meta_path[0] is not self:
            # Somebody came later and finds modules itself, as pytest does, which may be told of us by `-p`.
            sys.meta_path.remove(self)
            sys.meta_path.insert(0, self)
        if not self.members.may_have(name):
            return None
        for finder in list(sys.meta_path):
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            if (spec := finder.find_spec(name, path, target)) is not None:
                loads = spec.loader is not None and hasattr(spec.loader, "exec_module")
                if loads and self.members.has(name, spec.origin):
                    spec.loader = _Loader(spec.loader, self._namespace)
                return spec
        return None
