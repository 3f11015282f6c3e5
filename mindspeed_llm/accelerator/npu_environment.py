"""Environment variables that torch_npu, CANN and HCCL read, each with the reason why it is set.

They are read when torch_npu is imported or a communicator is made, so they are set once, before. What the user has set
stays.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from mindspeed_llm.errors import UserError


@dataclass(frozen=True)
class Variable:
    """One variable: its value here, and why it is not left to its default."""

    name: str
    value: str
    why: str


ALWAYS = (
    Variable(
        "TASK_QUEUE_ENABLE",
        "2",
        "launches are prepared in a second thread, which hides most of the host's time; costs some memory at the peak",
    ),
    Variable(
        "PYTORCH_NPU_ALLOC_CONF",
        "expandable_segments:True",
        "sizes vary from batch to batch with documents and experts, and fixed blocks then fragment",
    ),
    Variable(
        "CPU_AFFINITY_CONF",
        "1",
        "threads that launch kernels stay on the cores near their device, or launches are late",
    ),
    Variable(
        "HCCL_CONNECT_TIMEOUT",
        "1800",
        "ranks reach their first collective minutes apart, some still reading data; HCCL would give up after 120 s",
    ),
    Variable("HCCL_WHITELIST_DISABLE", "1", "without a list of hosts HCCL refuses every peer"),
)
DETERMINISTIC = (
    Variable("HCCL_DETERMINISTIC", "TRUE", "sums over ranks are formed in one order"),
    Variable("CLOSE_MATMUL_K_SHIFT", "1", "matrix products add up along k in one order on every core"),
)


def set_variables(variables: tuple[Variable, ...]) -> None:
    """Set those that are not set.

    Raises:
        UserError: the user set one of `DETERMINISTIC` to something else: the numbers would not be what was asked for.
    """
    for variable in variables:
        value = os.environ.setdefault(variable.name, variable.value)
        if variable in DETERMINISTIC and value.upper() != variable.value:
            raise UserError(
                f"{variable.name}: {value!r} is wrong, because --npu-deterministic is given and {variable.why} with "
                f"{variable.value} only; legal: {variable.value}; try: unset {variable.name}"
            )
