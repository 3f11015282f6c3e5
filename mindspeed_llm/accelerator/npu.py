"""Ascend NPUs as an accelerator: torch_npu's `torch.npu` behind our protocol.

torch_npu is imported when the device is first asked for, after the variables of `npu_environment` have been set.
Nothing of it is patched and `transfer_to_npu` is not used: megatron's modules see the device through our facade.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

from mindspeed_llm.accelerator import npu_environment, profiling
from mindspeed_llm.accelerator.caching_memory import CachingMemory
from mindspeed_llm.config.hccl_groups import OTHER_GROUPS, short_name
from mindspeed_llm.config.profiling import ProfilingConfig

# Generation of a chip, by what its name starts with (the first that fits), as `torch.npu.get_device_name` spells it.
GENERATIONS = (("Ascend910B", "A2"), ("Ascend910_93", "A3"), ("Ascend910_95", "A5"), ("Ascend950", "A5"))
# Numbers of ranks whose communication one kernel joins with a matrix product; later generations have no such kernel.
FUSED_COMMUNICATION = {"A2": (2, 4, 8), "A3": (2, 4, 8, 16)}


@functools.cache
def _problem() -> str | None:
    """Why torch_npu cannot be used here, None when it can."""
    if importlib.util.find_spec("torch_npu") is None:
        return "the package torch_npu is not installed"
    npu_environment.set_variables(npu_environment.ALWAYS)
    try:
        importlib.import_module("torch_npu")
    except (ImportError, RuntimeError, OSError) as error:
        # Without CANN a library is not found; a CUDA build of torch is refused; another version of it lacks symbols.
        return f"torch_npu cannot be loaded ({str(error).strip().splitlines()[-1]})"
    return None if torch.npu.is_available() else "torch_npu sees no device"


class NPU(CachingMemory):
    """See `protocol.Accelerator`."""

    name = "npu"
    device_type = "npu"
    distributed_backend = "hccl"
    supports_pin_memory = True
    # HCCL sums no float64.
    reduces_float64 = False

    def __init__(self) -> None:
        super().__init__()
        self._buffer_megabytes: dict[str, int] = {}

    def is_available(self) -> bool:
        return _problem() is None

    def why_unavailable(self) -> str:
        return _problem() or ""

    def device_count(self) -> int:
        return torch.npu.device_count()

    def current_device(self) -> torch.device:
        return torch.device("npu", torch.npu.current_device())

    def set_device(self, index: int) -> None:
        torch.npu.set_device(index)

    def synchronize(self) -> None:
        torch.npu.synchronize()

    def stream(self, stream: Any) -> AbstractContextManager:
        return torch.npu.stream(stream)

    def stream_type(self) -> type:
        return torch.npu.Stream

    def event_type(self) -> type:
        return torch.npu.Event

    def new_stream(self) -> Any:
        return torch.npu.Stream()

    def current_stream(self) -> Any:
        return torch.npu.current_stream()

    def new_event(self, enable_timing: bool = False) -> Any:
        return torch.npu.Event(enable_timing=enable_timing)

    def generator(self) -> torch.Generator:
        index = torch.npu.current_device()  # initialises the device, which makes the generators
        return torch.npu.default_generators[index]

    def memory_total(self) -> int:
        return torch.npu.mem_get_info()[1]

    def profiler(self, options: ProfilingConfig, worker: str) -> Any:
        return profiling.npu_profiler(options, worker)

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """None: no figure of a chip has been confirmed, and a wrong utilisation is worse than none."""
        return None

    def model(self) -> str:
        """The chip and its generation, e.g. "Ascend910B2 (A2)"."""
        chip = torch.npu.get_device_name()
        return f"{chip} ({generation_of(chip) or 'of an unknown generation'})"

    def ranks_of_fused_communication(self) -> tuple[int, ...]:
        """Sizes of groups that the kernels of `--use-ascend-mc2` take on this chip; () where it has none."""
        return FUSED_COMMUNICATION.get(generation_of(torch.npu.get_device_name()), ())

    def set_group_buffers(self, megabytes: Mapping[str, int]) -> None:
        """Sizes of HCCL's buffers by short name of a group (`config.hccl_groups`), for groups made from now on."""
        self._buffer_megabytes = dict(megabytes)

    def group_options(self, description: str | None) -> Any:
        """HCCL's options of a group that megatron describes so; None leaves HCCL's defaults."""
        sizes = self._buffer_megabytes
        megabytes = sizes.get(short_name(description), sizes.get(OTHER_GROUPS))
        if megabytes is None:
            return None
        import torch_npu

        options = torch_npu._C._distributed_c10d.ProcessGroupHCCL.Options()
        options.hccl_config = {"hccl_buffer_size": megabytes}
        return options

    def be_deterministic(self) -> None:
        """Let every kernel and collective sum in a fixed order; to be called before groups are made."""
        npu_environment.set_variables(npu_environment.DETERMINISTIC)
        torch.use_deterministic_algorithms(True)


def generation_of(chip: str) -> str | None:
    """A2, A3 or A5 by the name of a chip; None for one that `GENERATIONS` does not have."""
    return next((generation for word, generation in GENERATIONS if re.match(word, chip)), None)
