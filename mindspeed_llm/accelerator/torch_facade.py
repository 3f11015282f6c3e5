"""The module that megatron finds under the name `torch` when the device is not CUDA.

megatron-core says `torch.cuda.current_device()`, `device="cuda"`, `tensor.cuda()` throughout. Inside modules whose name
starts with one of the chosen prefixes, the name `torch` is bound to a `TorchFacade`: everything is torch's own, looked
up at each use, except `cuda`, the calls that take a device, `compile` (a no-op) and the process groups asked for with
nccl. Nobody else sees it: `torch.cuda.is_available()` and `vars(torch)` stay as they are.

What no name leads to is changed on torch's classes, see `tensor_methods`. `imports=True` also answers the imports of
modules loaded before `install`, and those of a program's `__main__`; `provide` answers imports of absent packages.

Not reached: a default argument or class attribute evaluated in a megatron module loaded before `install`.
"""

from __future__ import annotations

import builtins
import copy
import functools
import importlib.abc
import importlib.machinery
import inspect
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from mindspeed_llm.accelerator import tensor_methods
from mindspeed_llm.accelerator.cuda_namespace import CudaNamespace
from mindspeed_llm.accelerator.protocol import Accelerator
from mindspeed_llm.accelerator.stand_ins import StandIns
from mindspeed_llm.accelerator.tensor_methods import is_cuda as _is_cuda

DEFAULT_PREFIXES = ("megatron",)

# Functions of torch that megatron calls with device="cuda" or with a device from its configuration.
_DEVICE_FUNCTIONS = (
    "arange",
    "as_tensor",
    "empty",
    "empty_like",
    "empty_strided",
    "eye",
    "full",
    "full_like",
    "linspace",
    "logspace",
    "normal",
    "ones",
    "ones_like",
    "rand",
    "rand_like",
    "randint",
    "randn",
    "randn_like",
    "randperm",
    "tensor",
    "zeros",
    "zeros_like",
)

# Warnings megatron gives at import about packages that are optional to it and replaced here.
_OPTIONAL_PACKAGE_WARNINGS = (
    r".*Apex is not installed.*",
    r".*Transformer Engine and Apex are not installed.*",
    r".*transformer_engine.*",
    r".*TransformerEngine.*",
)


class NcclOptions:
    """`torch.distributed.ProcessGroupNCCL.Options` where torch has none: holds what a program sets, for nobody."""

    def __init__(self, is_high_priority_stream: bool = False):
        self.is_high_priority_stream = is_high_priority_stream
        self.config = types.SimpleNamespace()

    def __copy__(self) -> NcclOptions:
        made = NcclOptions(self.is_high_priority_stream)
        made.config = copy.copy(self.config)
        return made


class DistributedNamespace(types.ModuleType):
    """`torch.distributed`, except that a group asked for with nccl gets the accelerator's backend."""

    def __init__(self, accelerator: Accelerator):
        super().__init__("torch.distributed")
        self.__path__ = torch.distributed.__path__
        for name in ("init_process_group", "new_group"):
            self.__dict__[name] = self._with_backend(getattr(torch.distributed, name), accelerator)
        self.__dict__["init_device_mesh"] = self._on_accelerator(torch.distributed.init_device_mesh, accelerator)
        if not hasattr(torch.distributed, "ProcessGroupNCCL"):
            self.__dict__["ProcessGroupNCCL"] = types.SimpleNamespace(Options=NcclOptions)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.distributed, name)

    @staticmethod
    def _with_backend(function: Callable, accelerator: Accelerator) -> Callable:
        signature = inspect.signature(function)
        ours = accelerator.distributed_backend

        @functools.wraps(function)
        def with_backend(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            given = bound.arguments
            if isinstance(given.get("backend"), str):
                given["backend"] = _backend(given["backend"], accelerator)
            if given.get("backend") == ours and ours != "nccl" and _is_nccl_options(given.get("pg_options")):
                given["pg_options"] = None
            if given.get("backend") in (None, ours) and given.get("pg_options") is None and "group_desc" in given:
                given["pg_options"] = accelerator.group_options(given["group_desc"])
            if given.get("device_id") is not None:
                # torch binds groups to accelerators alone.
                given["device_id"] = None if accelerator.device_type == "cpu" else accelerator.current_device()
            return function(*bound.args, **bound.kwargs)

        return with_backend

    @staticmethod
    def _on_accelerator(function: Callable, accelerator: Accelerator) -> Callable:
        @functools.wraps(function)
        def on_accelerator(device_type: str, *args: Any, **kwargs: Any) -> Any:
            return function(accelerator.device_type if _is_cuda(device_type) else device_type, *args, **kwargs)

        return on_accelerator


def _backend(asked: str, accelerator: Accelerator) -> str:
    """The backend of a group: `nccl`, and `cuda:nccl` in a list of device types, is the accelerator's."""
    if asked.lower() == "nccl":
        return accelerator.distributed_backend
    if "cuda:nccl" not in asked:
        return asked
    pairs = dict(pair.split(":") for pair in asked.split(","))
    pairs.pop("cuda")
    pairs[accelerator.device_type] = accelerator.distributed_backend
    return ",".join(f"{device}:{backend}" for device, backend in pairs.items())


def _is_nccl_options(options: object) -> bool:
    return "NCCL" in type(options).__qualname__ or isinstance(options, NcclOptions)


class TorchFacade(types.ModuleType):
    """torch as megatron sees it; see the module docstring."""

    def __init__(self, accelerator: Accelerator):
        super().__init__("torch")
        self.__path__ = torch.__path__
        self.__spec__ = torch.__spec__
        self.__dict__["cuda"] = CudaNamespace(accelerator)
        self.__dict__["distributed"] = DistributedNamespace(accelerator)
        self.__dict__.update({name: self._on_device(getattr(torch, name), accelerator) for name in _DEVICE_FUNCTIONS})
        self.__dict__["device"] = _device_class(accelerator)
        self.__dict__["autocast"] = functools.partial(_autocast, accelerator)
        self.__dict__["compile"] = _no_compile
        self.__dict__["jit"] = _Overlay(torch.jit, script=_no_compile)
        self.__dict__["amp"] = _Overlay(torch.amp, autocast=self.__dict__["autocast"])
        self.__dict__["load"] = _load(accelerator)
        self.__dict__["Generator"] = _generator_class(accelerator)
        self.__dict__["set_default_device"] = _set_default_device(accelerator)
        if accelerator.device_type == "cpu":
            self.__dict__.update(_host_generator())

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def __dir__(self) -> Iterable[str]:
        return dir(torch)

    @staticmethod
    def _on_device(function: Callable, accelerator: Accelerator) -> Callable:
        @functools.wraps(function)
        def on_device(*args: Any, **kwargs: Any) -> Any:
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = accelerator.current_device()
            if not accelerator.supports_pin_memory:
                kwargs.pop("pin_memory", None)
            return function(*args, **kwargs)

        return on_device


def _device_class(accelerator: Accelerator) -> type:
    """`torch.device`, except that constructing a CUDA device gives the accelerator's; isinstance is torch.device's."""

    class DeviceType(type):
        def __call__(cls, *args: Any, **kwargs: Any) -> torch.device:
            first = args[0] if args else kwargs.get("type", kwargs.get("device"))
            return accelerator.current_device() if _is_cuda(first) else torch.device(*args, **kwargs)

        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, torch.device)

    return DeviceType("device", (), {"__module__": "torch"})


def _autocast(accelerator: Accelerator, device_type: str, *args: Any, **kwargs: Any) -> torch.autocast:
    return torch.autocast(accelerator.device_type if device_type == "cuda" else device_type, *args, **kwargs)


def _no_compile(function: Callable | None = None, **_options: Any) -> Callable:
    """torch.compile without compiling: it would need a C++ compiler on a CPU and seconds per function."""
    return function if function is not None else _no_compile


class _Overlay(types.ModuleType):
    """A module of torch with some names replaced."""

    def __init__(self, module: types.ModuleType, **names: Any):
        super().__init__(module.__name__)
        self.__dict__.update(names, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)


def _load(accelerator: Accelerator) -> Callable:
    """`torch.load` that maps tensors to the accelerator where CUDA is named, and those that were saved on CUDA too."""

    @functools.wraps(torch.load)
    def load(f: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        if _is_cuda(map_location) or (map_location is None and accelerator.device_type == "cpu"):
            map_location = accelerator.current_device()
        return torch.load(f, map_location, *args, **kwargs)

    return load


def _generator_class(accelerator: Accelerator) -> type:
    """`torch.Generator`, on the accelerator where CUDA is named; isinstance is torch.Generator's."""

    class GeneratorType(type):
        def __call__(cls, device: Any = "cpu") -> torch.Generator:
            return torch.Generator(accelerator.current_device() if _is_cuda(device) else device)

        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, torch.Generator)

    return GeneratorType("Generator", (), {"__module__": "torch"})


def _set_default_device(accelerator: Accelerator) -> Callable:
    @functools.wraps(torch.set_default_device)
    def set_default_device(device: Any) -> None:
        torch.set_default_device(accelerator.current_device() if _is_cuda(device) else device)

    return set_default_device


def _host_generator() -> dict[str, Callable]:
    """`torch.get_rng_state` and its like, as the stream beside the device's that megatron saves and checks.

    A CPU's kernels draw from torch's default generator, which is therefore the *device* generator of a CPU run.
    megatron also keeps the host's stream and complains when work under its tracker moves it, so here the host's stream
    is a generator of its own.
    """
    host = torch.Generator()
    return {
        "get_rng_state": host.get_state,
        "set_rng_state": host.set_state,
    }


def _import(name: str, globals=None, locals=None, fromlist=(), level: int = 0) -> Any:
    """`__import__` of the modules that see a facade; torch itself again once it is uninstalled."""
    if _installed is None:
        return _plain_import(name, globals, locals, fromlist, level)
    caller = "" if globals is None else globals.get("__name__", "")
    if level == 0 and (found := _installed.stand_ins.find(name, fromlist, caller)) is not None:
        return found
    module = _plain_import(name, globals, locals, fromlist, level)
    return _installed.answers.get(module, module) if isinstance(module, types.ModuleType) else module


def _import_of_all(name: str, globals=None, locals=None, fromlist=(), level: int = 0) -> Any:
    """`__import__` of the whole process: torch's own for modules without one of the prefixes."""
    caller = None if globals is None else globals.get("__name__")
    if caller is not None and _installed is not None and _installed.is_ours(caller):
        return _import(name, globals, locals, fromlist, level)
    return _plain_import(name, globals, locals, fromlist, level)


_plain_import = builtins.__import__
_BUILTINS = dict(vars(builtins), __import__=_import)


class _Loader(importlib.abc.Loader):
    """Runs a module with an `__import__` of its own, so that every `import torch` in it, at any depth, is answered."""

    def __init__(self, loader: importlib.abc.Loader):
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__dict__["__builtins__"] = _BUILTINS
        # The loader a module carries afterwards is the one that found it (inspect and pickle-by-reference use it).
        module.__loader__ = module.__spec__.loader = self._loader
        with warnings.catch_warnings():
            for message in _OPTIONAL_PACKAGE_WARNINGS:
                warnings.filterwarnings("ignore", message=message)
            self._loader.exec_module(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds modules through the other finders, and wraps the loader of those that shall see the facade."""

    def __init__(self, members: _Members):
        self.members = members

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if not self.members.may_have(name):
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            if (spec := finder.find_spec(name, path, target)) is not None:
                loads = spec.loader is not None and hasattr(spec.loader, "exec_module")
                if loads and self.members.has(name, spec.origin):
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Members:
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


class _Installation:
    """What `install` changed, so that `uninstall` can put it back."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        # On CUDA torch is what megatron expects; only absent packages are answered.
        self.facade = None if accelerator.device_type == "cuda" else TorchFacade(accelerator)
        self.answers = {theirs: ours for ours, theirs in self.pairs()}
        self.stand_ins = StandIns({}, _BUILTINS)
        self.members = _Members()
        self.finder = _Finder(self.members)
        self.answers_all = False
        self.rebound: list[tuple[types.ModuleType, str, Any]] = []
        self.methods: list[tuple[type, str, Any]] = []

    def pairs(self) -> list[tuple[types.ModuleType, types.ModuleType]]:
        """Each stand-in with what it stands for."""
        facade = self.facade
        if facade is None:
            return []
        inner = [(facade.cuda, torch.cuda), (facade.distributed, torch.distributed)]
        return [(facade, torch), *inner, (facade.jit, torch.jit), (facade.amp, torch.amp)]

    def is_ours(self, name: str) -> bool:
        """Whether the module of that name sees the facade."""
        return self.members.names(name)

    def start(self) -> None:
        sys.meta_path.insert(0, self.finder)
        if self.facade is not None:
            for owner, name, new in tensor_methods.changes(self.accelerator, self.is_ours):
                self.methods.append((owner, name, vars(owner).get(name)))
                setattr(owner, name, new)

    def extend(self, prefixes: tuple[str, ...], directories: tuple[str, ...]) -> None:
        """Show the facade to modules below these prefixes, or in these directories, too."""
        before = {module.__name__ for module in self.members.loaded()}
        self.members.add(prefixes, directories)
        for module in self.members.loaded():
            if module.__name__ not in before:
                self.rebind(module)

    def answer_all(self) -> None:
        """Answer the imports of modules that were loaded by the ordinary loader."""
        self.answers_all = True
        builtins.__import__ = _import_of_all

    def rebind(self, module: types.ModuleType) -> None:
        """Point the names of an already loaded module that mean torch, or things of it, at the facade's."""
        pairs = self.pairs()
        replacements = {id(theirs): ours for ours, theirs in pairs}
        for ours, theirs in pairs:
            for name, value in vars(ours).items():
                original = getattr(theirs, name, None)
                if callable(original) and not name.startswith("__"):
                    replacements.setdefault(id(original), value)
        for name, value in list(vars(module).items()):
            if name.startswith("__"):
                continue
            if id(value) in replacements:
                self._set(module, name, replacements[id(value)])
            elif isinstance(value, type) and value.__module__ == module.__name__:
                for method_name, method in list(vars(value).items()):
                    self._uncompile(value, method_name, method)
            else:
                self._uncompile(module, name, value)

    def _uncompile(self, owner: Any, name: str, value: Any) -> None:
        original = getattr(value, "_torchdynamo_orig_callable", None)
        if original is not None and self.facade is not None:
            self._set(owner, name, original)

    def _set(self, owner: Any, name: str, value: Any) -> None:
        self.rebound.append((owner, name, vars(owner)[name]))
        setattr(owner, name, value)

    def stop(self) -> None:
        if self.answers_all:
            builtins.__import__ = _plain_import
        self.stand_ins.withdraw()
        sys.meta_path.remove(self.finder)
        for owner, name, value in reversed(self.rebound):
            setattr(owner, name, value)
        for owner, name, value in reversed(self.methods):
            if value is None:  # inherited before (Tensor takes these from torch._C.TensorBase)
                delattr(owner, name)
            else:
                setattr(owner, name, value)
        # Modules loaded while installed hold the facade under the names they imported; give them torch itself.
        theirs = {id(ours): real for ours, real in self.pairs()}
        for module in self.members.loaded():
            for name, value in list(vars(module).items()):
                if id(value) in theirs:
                    setattr(module, name, theirs[id(value)])


_installed: _Installation | None = None


def install(
    accelerator: Accelerator,
    prefixes: tuple[str, ...] = DEFAULT_PREFIXES,
    *,
    directories: tuple[str, ...] = (),
    imports: bool = False,
) -> None:
    """Bind the facade inside modules with one of `prefixes`, loaded already or later. Twice is once; prefixes add up.

    On CUDA there is nothing to bind and nothing is changed.

    Args:
        directories: absolute paths; modules whose file lies in one of them see the facade whatever their name.
        imports: answer `import torch` in modules that were loaded before, and in `__main__`, too; it takes replacing
            `builtins.__import__`, which passes on what other modules import.

    Raises:
        RuntimeError: installed already for another accelerator; `uninstall` first.
    """
    global _installed
    if accelerator.device_type == "cuda" and not imports:
        return
    if _installed is not None:
        if _installed.accelerator is not accelerator:
            raise RuntimeError(
                f"the torch facade is installed for {_installed.accelerator.name}; uninstall it before installing it "
                f"for {accelerator.name}"
            )
    else:
        _installed = _Installation(accelerator)
        _installed.start()
    _installed.extend(tuple(prefixes), tuple(directories))
    if imports:
        _installed.answer_all()


def provide(modules: Mapping[str, str], only: Mapping[str, Sequence[str]] | None = None) -> None:
    """Answer imports of absent packages in the modules that see the facade, loaded already or later.

    Args:
        modules: name of a package -> dotted name of the module that answers for it; see `stand_ins`.
        only: for some packages, the modules that are answered.

    Raises:
        RuntimeError: the facade is not installed.
    """
    if _installed is None:
        raise RuntimeError("install the torch facade before providing packages")
    if _installed.stand_ins.modules:
        return
    _installed.stand_ins = StandIns(modules, _BUILTINS, only)
    _installed.stand_ins.ask_again(_installed.members.loaded)


def uninstall(unless: Accelerator | None = None) -> tuple[str, ...]:
    """Undo `install`; nothing happens when it is not installed, or is installed for the accelerator `unless`.

    Returns:
        The prefixes that see, or saw, the facade; the default ones when it is not installed.
    """
    global _installed
    if _installed is None:
        return DEFAULT_PREFIXES
    prefixes = _installed.members.prefixes
    if _installed.accelerator is not unless:
        _installed.stop()
        _installed = None
    return prefixes


def installed() -> TorchFacade | None:
    """The facade in use, None when there is none."""
    return None if _installed is None else _installed.facade
