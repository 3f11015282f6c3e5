"""torch's operators on the simulated device: every kernel of torch_npu that would launch work is the CPU's instead."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from simulator import host
from simulator.host import host_view, is_on_device, on_host, run_current_stream

# Kernels that allocate or look at a tensor's place without computing: torch_npu's own stay.
KEPT = (
    "_has_compatible",
    "_lazy_clone",
    "_pin_memory",
    "_reshape_alias",
    "alias",
    "as_strided",
    "detach",
    "empty",
    "flatten_dense_tensors",
    "full",
    "is_pinned",
    "is_set_to",
    "lift",
    "new_empty",
    "pin_memory",
    "record_stream",
    "resize_",
    "set_",
    "squeeze",
    "unfold",
    "unsqueeze",
    "view",
)
# Kernels that take indices from the host.
INDEXING = ("index", "index_put_", "_index_put_impl_", "index_put")
# Random kernels whose schema names no generator.
RANDOM = ("native_dropout", "rand_like", "randn_like", "_fused_dropout")

_libraries: list[torch.library.Library] = []  # registrations end with the object


def register() -> int:
    """Replace the kernels.

    Returns:
        How many were replaced.
    """
    library = torch.library.Library("aten", "IMPL")
    _libraries.append(library)
    count = 0
    for name in torch._C._dispatch_get_all_op_names():
        base, _, overload = name.removeprefix("aten::").partition(".")
        if not name.startswith("aten::") or base.startswith(KEPT) or base in COPIES:
            continue
        if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "PrivateUse1"):
            continue
        if not hasattr(torch.ops.aten, base):  # torch_npu's own, not reachable from Python
            continue
        operator = getattr(getattr(torch.ops.aten, base), overload or "default")
        kernel = COMPUTED.get(name.removeprefix("aten::"), operator)
        library.impl(
            name, on_host(_drawing(kernel) if _is_random(operator) else kernel, mixes=base in INDEXING), "PrivateUse1"
        )
        count += 1
    for base, kernel in COPIES.items():
        library.impl(base, kernel, "PrivateUse1", allow_override=True)
    return count + len(COPIES)


def _is_random(operator: torch._ops.OpOverload) -> bool:
    schema = operator._schema
    takes_generator = any("Generator" in str(argument.type) for argument in schema.arguments)
    return takes_generator or schema.name.removeprefix("aten::") in RANDOM


def _drawing(operator: Callable[..., Any]) -> Callable[..., Any]:
    """A random kernel whose numbers are a function of the device generator's seed and offset, which moves on."""

    def draw(*args: Any, **kwargs: Any) -> Any:
        given = kwargs.pop("generator", None)
        args = tuple(arg for arg in args if not isinstance(arg, torch.Generator))
        if given is not None and given.device.type == "cpu":
            return operator(*args, **kwargs, generator=given)
        with drawing_from(given):
            return operator(*args, **kwargs)

    return draw


class drawing_from:
    """Context in which the CPU's default generator continues a generator of the device (default: the current one's)."""

    def __init__(self, generator: torch.Generator | None = None):
        self.generator = generator or torch.npu.default_generators[torch.npu.current_device()]

    def __enter__(self) -> None:
        self.host_state = torch.default_generator.get_state()
        seed, offset = self.generator.get_state().view(torch.int64).tolist()
        torch.default_generator.manual_seed(hash((seed, offset)) & 0x7FFFFFFFFFFFFFFF)
        self.generator.set_state(torch.tensor([seed, offset + 4]).view(torch.uint8))

    def __exit__(self, *error: object) -> None:
        torch.default_generator.set_state(self.host_state)


def _on_host(x: Tensor) -> Tensor:
    return host_view(x) if is_on_device(x) else x


def _copy_(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if not (host.LAZY and non_blocking and _copies_bytes(target, source)):
        run_current_stream()
        _on_host(target).copy_(_on_host(source))
        return target
    size = target.numel() * target.element_size()
    stream = ctypes.c_void_p(torch.npu.current_stream().npu_stream)
    pointers = (ctypes.c_void_p(x.data_ptr()) for x in (target, source))
    to, origin = pointers
    host._cann.aclrtMemcpyAsync(to, ctypes.c_size_t(size), origin, ctypes.c_size_t(size), 0, stream)
    return target


def _copies_bytes(target: Tensor, source: Tensor) -> bool:
    """Whether a device would copy behind the program's back: the bytes as they are, host memory being page-locked."""
    plain = target.dtype == source.dtype and target.size() == source.size()
    plain = plain and target.is_contiguous() and source.is_contiguous()
    return plain and all(is_on_device(x) or x.is_pinned() for x in (target, source))


def _contiguous(x: Tensor, *, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    return x if x.is_contiguous(memory_format=memory_format) else _clone(x, memory_format=memory_format)


def _clone(x: Tensor, *, memory_format: torch.memory_format | None = None) -> Tensor:
    run_current_stream()
    copy = host_view(x).clone(memory_format=memory_format or torch.preserve_format)
    return host.to_device(copy, x.device)


def _to_copy(
    x: Tensor,
    *,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    device: torch.device | str | None = None,
    pin_memory: bool | None = None,
    non_blocking: bool = False,
    memory_format: torch.memory_format | None = None,
) -> Tensor:
    device = torch.device(x.device if device is None else device)
    like = torch.empty_like(x, device="meta", memory_format=memory_format or torch.preserve_format)
    out = torch.empty_strided(
        x.size(), like.stride(), dtype=dtype or x.dtype, device=device, pin_memory=bool(pin_memory)
    )
    return _copy_(out, x, non_blocking)


def _matmul_backward(grad: Tensor, x: Tensor, other: Tensor, mask: list[bool]) -> tuple[Tensor | None, Tensor | None]:
    """torch differentiates matmul by its parts on a CPU and has no kernel for the whole."""
    # As matrices: a vector is one row on the left and one column on the right.
    left = x.unsqueeze(0) if x.dim() == 1 else x
    right = other.unsqueeze(1) if other.dim() == 1 else other
    grad = grad.unsqueeze(-2) if x.dim() == 1 else grad
    grad = grad.unsqueeze(-1) if other.dim() == 1 else grad
    grad_x = (grad @ right.mT).sum_to_size(left.shape).view_as(x) if mask[0] else None
    grad_other = (left.mT @ grad).sum_to_size(right.shape).view_as(other) if mask[1] else None
    return grad_x, grad_other


# Operators for which the CPU has no kernel of its own.
COMPUTED: dict[str, Callable[..., Any]] = {"matmul_backward": _matmul_backward}
# Operators between devices, or with a result that may be the argument itself.
COPIES: dict[str, Callable[..., Tensor]] = {
    "copy_": _copy_,
    "contiguous": _contiguous,
    "clone": _clone,
    "_to_copy": _to_copy,
}
