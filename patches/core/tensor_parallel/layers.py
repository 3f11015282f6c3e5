"""Patches of megatron.core.tensor_parallel.layers."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor

from mindspeed_llm import accelerator
from mindspeed_llm.accelerator import host_random
from mindspeed_llm.patching import Patch


def _advice_given_without_cuda(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def linear(*args, **kwargs) -> Tensor:
        return original(*args, **kwargs)

    # megatron reads this attribute of whatever stands under the name to advise once only.
    linear.warned = original.warned or accelerator.current().device_type != "cuda"
    return linear


def _drawn_from_the_hosts_stream(original: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    if accelerator.current().device_type != "cpu":
        return original

    @functools.wraps(original)
    def initialize(*args, **kwargs) -> Tensor | None:
        with host_random.drawing():
            return original(*args, **kwargs)

    return initialize


PATCHES = (
    Patch(
        name="initial-weights-of-the-host",
        target="megatron.core.tensor_parallel.layers:_initialize_affine_weight_cpu",
        why="with use_cpu_initialization every rank draws the whole weight from the host's stream, which ranks have in "
        "common; a CPU's one stream is the device's, which may be seeded by rank",
        wrap=_drawn_from_the_hosts_stream,
        fingerprints={"0.15.3": "a5a12c75888a", "0.16.1": "a5a12c75888a"},
    ),
    Patch(
        name="no-cuda-connection-advice",
        target="megatron.core.tensor_parallel.layers:linear_with_grad_accumulation_and_async_allreduce",
        why="it advises on CUDA_DEVICE_MAX_CONNECTIONS in every run, also where there is no CUDA device",
        wrap=_advice_given_without_cuda,
        fingerprints={"0.15.3": "212ab88edb75", "0.16.1": "212ab88edb75"},
    ),
)
