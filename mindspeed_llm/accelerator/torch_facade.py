"""The module that megatron finds under the name `torch` when the device is not CUDA.

megatron-core says `torch.cuda.current_device()`, `device="cuda"`, `tensor.cuda()` throughout. Inside modules whose name
starts with one of the chosen prefixes, the name `torch` is bound to a `TorchFacade`: everything is torch's own, looked
up at each use, except `cuda`, the calls that take a device, `compile` (a no-op) and the process groups asked for with
nccl. Nobody else sees it: `torch.cuda.is_available()` and `vars(torch)` stay as they are.

Three things cannot be reached through a name and are changed on torch's classes while installed, each acting only when
the calling module has one of the prefixes: `Tensor.cuda`, `Module.cuda`, and `Tensor.type()`, whose answer megatron's
optimizers compare with 'torch.cuda.FloatTensor' and its like.

Not reached: a default argument or class attribute evaluated in a megatron module loaded before `install`, and an
`import torch` inside a function of such a module. Modules loaded afterwards are reached in full.
"""

from __future__ import annotations

import builtins
import functools
import importlib.abc
import importlib.machinery
import inspect
import sys
import types
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch

from mindspeed_llm.accelerator.cuda_namespace import CudaNamespace
from mindspeed_llm.accelerator.protocol import Accelerator

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


class DistributedNamespace(types.ModuleType):
    """`torch.distributed`, except that a group asked for with nccl gets the accelerator's backend."""

    def __init__(self, accelerator: Accelerator):
        super().__init__("torch.distributed")
        self.__path__ = torch.distributed.__path__
        for name in ("init_process_group", "new_group"):
            self.__dict__[name] = self._with_backend(getattr(torch.distributed, name), accelerator)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.distributed, name)

    @staticmethod
    def _with_backend(function: Callable, accelerator: Accelerator) -> Callable:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def with_backend(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            if bound.arguments.get("backend") == "nccl":
                bound.arguments["backend"] = accelerator.distributed_backend
            if _is_cuda(bound.arguments.get("device_id")):
                bound.arguments["device_id"] = accelerator.current_device()
            return function(*bound.args, **bound.kwargs)

        return with_backend


def _is_cuda(device: object) -> bool:
    if isinstance(device, str):
        return device == "cuda" or device.startswith("cuda:")
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, int) and not isinstance(device, bool)


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
    module = builtins.__import__(name, globals, locals, fromlist, level)
    if _installed is None:
        return module
    facade = _installed.facade
    if module is torch:
        return facade
    if module is torch.cuda:
        return facade.cuda
    return facade.distributed if module is torch.distributed else module


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
    """Finds modules with one of the prefixes through the other finders and wraps their loader."""

    def __init__(self, prefixes: tuple[str, ...]):
        self.prefixes = prefixes

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if not has_prefix(name, self.prefixes):
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            if (spec := finder.find_spec(name, path, target)) is not None:
                if spec.loader is not None and hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


def has_prefix(name: str, prefixes: tuple[str, ...]) -> bool:
    """Whether module `name` is one of `prefixes` or lies below one."""
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


class _Installation:
    """What `install` changed, so that `uninstall` can put it back."""

    def __init__(self, accelerator: Accelerator, prefixes: tuple[str, ...]):
        self.prefixes = prefixes
        self.accelerator = accelerator
        self.facade = TorchFacade(accelerator)
        self.finder = _Finder(prefixes)
        self.rebound: list[tuple[types.ModuleType, str, Any]] = []
        self.methods: list[tuple[type, str, Any]] = []

    def pairs(self) -> list[tuple[types.ModuleType, types.ModuleType]]:
        """Each stand-in with what it stands for."""
        facade = self.facade
        return [(facade, torch), (facade.cuda, torch.cuda), (facade.distributed, torch.distributed)]

    def start(self) -> None:
        sys.meta_path.insert(0, self.finder)
        self._change_methods()
        self.extend(self.prefixes)

    def extend(self, prefixes: tuple[str, ...]) -> None:
        """Show the facade to modules below these prefixes too."""
        self.prefixes = tuple(dict.fromkeys(self.prefixes + prefixes))
        self.finder.prefixes = self.prefixes
        for name, module in list(sys.modules.items()):
            if module is not None and has_prefix(name, prefixes):
                self.rebind(module)

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
        if original is not None:
            self._set(owner, name, original)

    def _set(self, owner: Any, name: str, value: Any) -> None:
        self.rebound.append((owner, name, vars(owner)[name]))
        setattr(owner, name, value)

    def _change_methods(self) -> None:
        accelerator = self.accelerator
        tensor_cuda, module_cuda, tensor_type = torch.Tensor.cuda, torch.nn.Module.cuda, torch.Tensor.type

        def caller_is_ours() -> bool:
            return has_prefix(sys._getframe(2).f_globals.get("__name__", ""), self.prefixes)

        @functools.wraps(tensor_cuda)
        def cuda_of_tensor(tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            return tensor.to(accelerator.current_device()) if caller_is_ours() else tensor_cuda(tensor, *args, **kwargs)

        @functools.wraps(module_cuda)
        def cuda_of_module(module, *args: Any, **kwargs: Any) -> torch.nn.Module:
            return module.to(accelerator.current_device()) if caller_is_ours() else module_cuda(module, *args, **kwargs)

        @functools.wraps(tensor_type)
        def type_of_tensor(tensor, *args: Any, **kwargs: Any) -> Any:
            answer = tensor_type(tensor, *args, **kwargs)
            if isinstance(answer, str) and tensor.device.type == accelerator.device_type and caller_is_ours():
                return "torch.cuda." + answer.rsplit(".", 1)[1]
            return answer

        for owner, name, new in (
            (torch.Tensor, "cuda", cuda_of_tensor),
            (torch.nn.Module, "cuda", cuda_of_module),
            (torch.Tensor, "type", type_of_tensor),
        ):
            self.methods.append((owner, name, vars(owner).get(name)))
            setattr(owner, name, new)

    def stop(self) -> None:
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
        for module_name, module in list(sys.modules.items()):
            if module is not None and has_prefix(module_name, self.prefixes):
                for name, value in list(vars(module).items()):
                    if id(value) in theirs:
                        setattr(module, name, theirs[id(value)])


_installed: _Installation | None = None


def install(accelerator: Accelerator, prefixes: tuple[str, ...] = DEFAULT_PREFIXES) -> None:
    """Bind the facade inside modules with one of `prefixes`, loaded already or later. Twice is once; prefixes add up.

    On CUDA there is nothing to bind and nothing is changed.

    Raises:
        RuntimeError: installed already for another accelerator; `uninstall` first.
    """
    global _installed
    if accelerator.device_type == "cuda":
        return
    if _installed is not None:
        if _installed.accelerator is not accelerator:
            raise RuntimeError(
                f"the torch facade is installed for {_installed.accelerator.name}; uninstall it before installing it "
                f"for {accelerator.name}"
            )
        _installed.extend(tuple(prefixes))
        return
    _installed = _Installation(accelerator, tuple(prefixes))
    _installed.start()


def uninstall(unless: Accelerator | None = None) -> tuple[str, ...]:
    """Undo `install`; nothing happens when it is not installed, or is installed for the accelerator `unless`.

    Returns:
        The prefixes that see, or saw, the facade; the default ones when it is not installed.
    """
    global _installed
    if _installed is None:
        return DEFAULT_PREFIXES
    prefixes = _installed.prefixes
    if _installed.accelerator is not unless:
        _installed.stop()
        _installed = None
    return prefixes


def installed() -> TorchFacade | None:
    """The facade in use, None when there is none."""
    return None if _installed is None else _installed.facade
