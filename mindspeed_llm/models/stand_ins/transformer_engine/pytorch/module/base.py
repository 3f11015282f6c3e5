"""The base class of Transformer Engine's modules, and what megatron takes from beside it."""

from __future__ import annotations

from collections.abc import Sequence
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


class TransformerEngineBaseModule(nn.Module):
    """A module whose state has an entry for scales, which is empty."""

    def __init__(self) -> None:
        super().__init__()
        self.fp8 = self.fp8_calibration = False
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False, "recipe": None}

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

    def refuse_overlap(self, options: dict[str, Any]) -> None:
        """Refuse what only Transformer Engine's kernels do, among further keyword arguments.

        Raises:
            UserError: one of them is asked for.
            TypeError: one of them is unknown.
        """
        for name, value in options.items():
            if name in _WITHOUT_EFFECT:
                continue
            if not name.startswith("ub_") and name not in ("delay_wgrad_compute", "symmetric_ar_type"):
                raise TypeError(f"{type(self).__name__} has no argument {name!r}")
            if value:
                raise refuse(f"{name}={value}", f"{name}={None if name == 'symmetric_ar_type' else False}")
