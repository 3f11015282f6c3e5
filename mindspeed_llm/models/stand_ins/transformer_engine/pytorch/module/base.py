"""The base class of Transformer Engine's modules, and what megatron takes from beside it."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mindspeed_llm import accelerator
from mindspeed_llm.models.stand_ins.transformer_engine.refusal import refuse

# Arguments that choose kernels or buffers and never values: communication over user buffers.
_WITHOUT_EFFECT = ("ub_name", "ub_bulk_wgrad", "ub_bulk_dgrad")


def get_dummy_wgrad(shape: Sequence[int], dtype: torch.dtype, zero: bool = False) -> Tensor:
    """A gradient whose values nobody reads, because they were added elsewhere; zeros where somebody does."""
    make = torch.zeros if zero else torch.empty
    return make(tuple(shape), dtype=dtype, device=accelerator.current().current_device())


def get_workspace() -> Tensor:
    """Scratch memory of cuBLAS; our products need none."""
    return torch.empty(0, dtype=torch.uint8)


def device_of(device: Any) -> torch.device:
    """The device parameters are made on: the accelerator's where CUDA, a number or nothing is asked for."""
    if isinstance(device, torch.device | str) and torch.device(device).type != "cuda":
        return torch.device(device)
    return accelerator.current().current_device()


class UserBufferQuantizationMode(enum.Enum):
    """In which bits user buffers hold what they send; named by whoever asks for such buffers, see `initialize_ub`."""

    NONE = "none"
    FP8 = "fp8"


def initialize_ub(*_arguments: Any, **_options: Any) -> None:
    """Make the buffers in CUDA memory through which tensor-parallel ranks would send while they compute.

    Raises:
        UserError: there are none here.
    """
    raise refuse("communication over user buffers (--tp-comm-overlap)", "training without it")


class _Recorded(torch.autograd.Function):
    """out, whose gradient is handed to `keep` with x; the weight is here so that out has one when x has none."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, weight: Tensor, keep: Callable[..., None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.keep = keep
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.keep(*ctx.saved_tensors, grad)
        return grad, None, None, None


class DeferredGradients:
    """Gradients of weights that are computed after the backward pass, in the order of the backward passes.

    Args:
        fused: add them to `main_grad` instead of `grad`.
    """

    def __init__(self, fused: bool):
        self.fused = fused
        self._passes: list[tuple[nn.Parameter, Tensor, Tensor, Any]] = []

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None, options: dict[str, Any]) -> Tensor:
        """x [..., in] weight [out, in]^T + bias, with the gradient of x alone; options are those of megatron's layer.

        The bias is added outside: its gradient costs little and comes with the backward pass.
        """
        from megatron.core.tensor_parallel.layers import linear_with_frozen_weight

        out = linear_with_frozen_weight(x, weight.detach(), None, gradient_accumulation_fusion=False, **options)
        group = options["tp_group"] if options["sequence_parallel"] else None

        def keep(x: Tensor, grad: Tensor) -> None:
            self._passes.append((weight, x, grad, group))

        out = _Recorded.apply(out, x.detach(), weight, keep)
        return out if bias is None else out + bias

    def compute(self) -> None:
        """Add the gradients of the earliest pass: of each weight, once."""
        done: set[int] = set()
        later = []
        for weight, x, grad, group in self._passes:
            if id(weight) in done:
                later.append((weight, x, grad, group))
                continue
            done.add(id(weight))
            self._add(weight, x if group is None else _gathered(x, group), grad)
        self._passes = later

    def _add(self, weight: nn.Parameter, x: Tensor, grad: Tensor) -> None:
        product = grad.flatten(0, -2).t() @ x.flatten(0, -2)
        if self.fused:
            weight.main_grad.add_(product)
            weight.grad_added_to_main_grad = True
            weight.grad = get_dummy_wgrad(weight.shape, weight.dtype)
        else:
            weight.grad = product.to(weight.dtype) if weight.grad is None else weight.grad + product


def _gathered(x: Tensor, group: Any) -> Tensor:
    """The whole sequence of which each rank of a group has a part."""
    whole = x.new_empty(x.shape[0] * group.size(), *x.shape[1:])
    torch.distributed.all_gather_into_tensor(whole, x.contiguous(), group=group)
    return whole


@dataclass(frozen=True)
class ParameterInit:
    """How a parameter is drawn; `fp8_meta_index` tells that it has no scale."""

    init_fn: Callable[[Tensor], Any]
    fp8_meta_index: int | None = None


class TransformerEngineBaseModule(nn.Module):
    """A module whose state has an entry for scales, which is empty."""

    primary_weights_in_fp8 = False

    def __init__(self) -> None:
        super().__init__()
        # Megatron's FSDP, which makes models on the meta device, looks here for what it has to draw.
        self.param_init_meta: dict[str, ParameterInit] = {}
        self.deferred: DeferredGradients | None = None
        self._hooks_of_gradients: list[Callable[[], None]] = []
        self.fp8 = self.fp8_calibration = False
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False, "recipe": None}

    def draw(self, name: str, parameter: nn.Parameter, init_fn: Callable[[Tensor], Any]) -> None:
        """Register a parameter and draw its values, now or, on the meta device, in `reset_parameters`."""
        self.register_parameter(name, parameter)
        self.param_init_meta[name] = ParameterInit(init_fn)
        if not parameter.is_meta:
            init_fn(parameter)

    def mark_parameters(self) -> None:
        """Tell megatron, by attributes of parameters, how ranks share them."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters again; those on the meta device get memory on the accelerator first."""
        for name, how in self.param_init_meta.items():
            parameter = getattr(self, name)
            if parameter.is_meta:
                made = torch.empty_like(parameter, device=accelerator.current().current_device())
                parameter = nn.Parameter(made, parameter.requires_grad)
                setattr(self, name, parameter)
            how.init_fn(parameter)
        self.mark_parameters()

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        """There are no scales to prepare."""

    def get_extra_state(self) -> Tensor:
        """No scales: an empty tensor, as Transformer Engine stores it."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        """Take scales from a checkpoint.

        Raises:
            UserError: it holds some.
        """
        if isinstance(state, Tensor) and state.numel():
            raise refuse("a checkpoint with 8-bit scales", "a checkpoint trained in fp32, bf16 or fp16")

    def set_tensor_parallel_group(self, group: Any) -> None:
        """Name the ranks among which the module is cut."""
        self.tp_group = group

    def defer_gradients(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Leave the gradients of weights to `backward_dw`; megatron finds the parameters by an attribute."""
        self.deferred = DeferredGradients(getattr(self, "fuse_wgrad_accumulation", False))
        for parameter in parameters.values():
            parameter.skip_backward_post_hook = True

    def register_wgrad_accumulation_and_reduce_hooks(self, hook: Callable[[], None]) -> None:
        """Call `hook` once the gradients that were left to `backward_dw` are there."""
        self._hooks_of_gradients.append(hook)

    def backward_dw(self) -> None:
        """Compute the weights' gradients of the earliest backward pass they were left out of."""
        if self.deferred is not None:
            self.deferred.compute()
            for hook in self._hooks_of_gradients:
                hook()

    def refuse_overlap(self, options: dict[str, Any]) -> None:
        """Refuse what only Transformer Engine's kernels do, among further keyword arguments.

        Raises:
            UserError: one of them is asked for.
            TypeError: one of them is unknown.
        """
        for name, value in options.items():
            if name in _WITHOUT_EFFECT:
                continue
            if not name.startswith("ub_") and name != "symmetric_ar_type":
                raise TypeError(f"{type(self).__name__} has no argument {name!r}")
            if value:
                raise refuse(f"{name}={value}", f"{name}={None if name == 'symmetric_ar_type' else False}")
