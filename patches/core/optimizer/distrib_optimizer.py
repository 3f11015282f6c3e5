"""Patches of megatron.core.optimizer.distrib_optimizer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from mindspeed_llm.patching import Patch


def _own_step_count(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def set_states(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        if "step" in state:
            # Loaded already, from the parameter groups, but as one tensor that all parameters share: AdamW would count
            # it up once for each of them.
            state["step"] = state["step"].clone()
            tensors = {**tensors, "step": state["step"]}
        original(self, model_param, tensors)

    return set_states


PATCHES = (
    Patch(
        name="distributed-optimizer-torch-adam-step",
        target="megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._set_main_param_and_optimizer_states",
        why="torch's AdamW, used where Apex and Transformer Engine are absent, keeps `step` per parameter, which the "
        "checkpoint stores per group; loading then fails with KeyError, and parameters would share one step count",
        wrap=_own_step_count,
        fingerprints={"0.15.3": "0fb8c1343b9d", "0.16.1": "0fb8c1343b9d"},
    ),
)
