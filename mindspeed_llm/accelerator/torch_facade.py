"""The module that megatron finds under the name `torch` when the device is not CUDA.

megatron-core says `torch.cuda.current_device()`, `device="cuda"`, `tensor.cuda()` throughout. Inside modules whose name
starts with one of the chosen prefixes, the name `torch` is bound to a `TorchFacade`: everything is torch's own, looked
up at each use, except `cuda`, the calls that take a device, `compile` (a no-op) and the process groups asked for with
nccl. Nobody else sees it: `torch.cuda.is_available()` and `vars(torch)` stay as they are.

What no name leads to is changed on torch's classes, see `tensor_methods`; `torch_namespace` holds the names, `members`
decides whose they are. `imports=True` also answers the imports of modules loaded before `install`, and those of a
program's `__main__`; `provide` answers imports of absent packages, and `importlib.metadata.version` of them.

Not reached: a default argument or class attribute evaluated in a megatron module loaded before `install`.
"""

from __future__ import annotations

import builtins
import importlib.metadata
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from mindspeed_llm.accelerator import device_type, tensor_methods
from mindspeed_llm.accelerator.distributed_namespace import Overlay
from mindspeed_llm.accelerator.members import Finder, Members
from mindspeed_llm.accelerator.protocol import Accelerator
from mindspeed_llm.accelerator.stand_ins import StandIns
from mindspeed_llm.accelerator.torch_namespace import TorchFacade

DEFAULT_PREFIXES = ("megatron",)
# Packages that load on any machine and compute on CUDA only. Megatron prefers them wherever they can be imported: on
# other devices it does not find them.
CUDA_ONLY = frozenset((
    "amp_C", "apex", "causal_conv1d", "deep_ep", "fast_hadamard_transform", "fast_layer_norm", "flash_attn",
    "flash_attn_3", "flash_attn_interface", "flash_mla", "flashattn_hopper", "flashinfer", "fused_layer_norm_cuda",
    "fused_weight_gradient_mlp_cuda", "grouped_gemm", "mamba_ssm", "scaled_masked_softmax_cuda", "scaled_softmax_cuda",
    "scaled_upper_triang_masked_softmax_cuda", "transformer_engine", "transformer_engine_torch",
))  # fmt: skip


def _import(name: str, globals=None, locals=None, fromlist=(), level: int = 0) -> Any:
    """`__import__` of the modules that see a facade; torch itself again once it is uninstalled."""
    if _installed is None:
        return _plain_import(name, globals, locals, fromlist, level)
    caller = "" if globals is None else globals.get("__name__", "")
    if level == 0 and (found := _installed.stand_ins.find(name, fromlist, caller)) is not None:
        return found
    if level == 0 and (root := name.partition(".")[0]) in _installed.hidden:
        device = _installed.accelerator.name
        raise ModuleNotFoundError(f"No module named {root!r} on {device}: it computes on CUDA only", name=root)
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


class _Installation:
    """What `install` changed, so that `uninstall` can put it back."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        # On CUDA torch is what megatron expects; only absent packages are answered.
        self.facade = None if accelerator.device_type == "cuda" else TorchFacade(accelerator)
        self.metadata = Overlay(importlib.metadata, version=self.version)
        self.answers = {theirs: ours for ours, theirs in self.pairs()}
        self.hidden = frozenset() if self.facade is None else CUDA_ONLY
        self.stand_ins = StandIns({}, _BUILTINS)
        self.members = Members()
        self.finder = Finder(self.members, _BUILTINS)
        self.answers_all = False
        self.rebound: list[tuple[types.ModuleType, str, Any]] = []
        self.methods: list[tuple[type, str, Any]] = []
        self.restore_device_type: Callable[[], None] | None = None

    def version(self, distribution_name: str) -> str:
        """`importlib.metadata.version`, which knows the packages that are stood in for."""
        return self.stand_ins.version(distribution_name) or importlib.metadata.version(distribution_name)

    def pairs(self) -> list[tuple[types.ModuleType, types.ModuleType]]:
        """Each stand-in with what it stands for."""
        facade, packages = self.facade, (self.metadata, importlib.metadata)
        if facade is None:
            return [packages]
        meshes = (facade.distributed.device_mesh, torch.distributed.device_mesh)
        inner = [(facade.cuda, torch.cuda), (facade.cuda.nvtx, torch.cuda.nvtx)]
        inner += [(facade.distributed, torch.distributed), meshes, packages]
        outer = [(getattr(facade, name), getattr(torch, name)) for name in ("jit", "amp", "accelerator")]
        return [(facade, torch), *inner, *((ours, theirs) for ours, theirs in outer if ours is not theirs)]

    def functions(self) -> Iterator[tuple[str, Any, Any]]:
        """Each function and class of a stand-in with its name and what it stands for."""
        for ours, theirs in self.pairs():
            for name, value in vars(ours).items():
                original = getattr(theirs, name, None)
                if callable(original) and not name.startswith("__"):
                    yield name, value, original

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
        """Answer the imports of modules that were loaded by the ordinary loader, and what a program asks of devices."""
        self.answers_all = True
        builtins.__import__ = _import_of_all
        if self.facade is not None and self.restore_device_type is None:
            self.restore_device_type = device_type.install(self.accelerator, self.is_ours)

    def rebind(self, module: types.ModuleType) -> None:
        """Point the names of an already loaded module that mean torch, or things of it, at the facade's."""
        replacements = {id(theirs): ours for ours, theirs in self.pairs()}
        for _, value, original in self.functions():
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
        if self.restore_device_type is not None:
            self.restore_device_type()
        self.stand_ins.withdraw()
        sys.meta_path.remove(self.finder)
        for owner, name, value in reversed(self.rebound):
            setattr(owner, name, value)
        for owner, name, value in reversed(self.methods):
            if value is None:  # inherited before (Tensor takes these from torch._C.TensorBase)
                delattr(owner, name)
            else:
                setattr(owner, name, value)
        self._restore_imported()

    def _restore_imported(self) -> None:
        """Give torch's own to modules loaded while installed, which hold the facade's under the names they imported."""
        originals = {id(ours): {"": real} for ours, real in self.pairs()}
        for name, value, original in self.functions():
            # One of ours may stand for several of torch's, which then go by their names.
            originals.setdefault(id(value), {"": original})[name] = original
        for module in self.members.loaded():
            for name, value in list(vars(module).items()):
                if (found := originals.get(id(value))) is not None:
                    setattr(module, name, found.get(name, found[""]))


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
        imports: for somebody else's program: answer `import torch` in modules that were loaded before, and in
            `__main__`, too, which takes replacing `builtins.__import__` (it passes on what other modules import); and
            let `device.type` equal "cuda", see `device_type`.

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
    _installed.stand_ins = StandIns(modules, _BUILTINS, only, _installed.hidden)
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
