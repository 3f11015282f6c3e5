"""Make the simulated device ready in this process."""

from __future__ import annotations

import os


def start() -> None:
    """Load torch_npu and replace everything that would launch work. Twice is once.

    Raises:
        RuntimeError: the process has not the environment of `build.environment`.
    """
    if "ASCEND_SIMULATOR" not in os.environ:
        raise RuntimeError("the process was not started with the simulator's environment (simulator.build.environment)")
    if _started:
        return
    _started.append(True)
    import torch_npu  # noqa: F401  (registers the device)

    from simulator import aten, hccl, kernels

    aten.register()
    kernels.register()
    hccl.register()


_started: list[bool] = []
