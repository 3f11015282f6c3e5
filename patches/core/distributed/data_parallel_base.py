"""Patches of megatron.core.distributed.data_parallel_base."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from mindspeed_llm.errors import UserError
from mindspeed_llm.patching import Patch


def _takes_what_it_is_passed(original: Callable[[Any], None]) -> Callable[..., None]:
    @functools.wraps(original)
    def finish_grad_sync(self: Any, force_all_reduce: bool | None = False) -> None:
        if force_all_reduce:
            raise UserError(
                f"force_all_reduce: True is wrong, because {type(self).__name__} leaves each rank its share of the "
                "gradients; legal: False; try: training without --save-wgrads-interval, or without --use-torch-fsdp2"
            )
        original(self)

    return finish_grad_sync


PATCHES = (
    Patch(
        name="gradients-of-torch-fsdp2-are-finished",
        target="megatron.core.distributed.data_parallel_base:_BaseDataParallel.finish_grad_sync",
        why="finalize_model_grads passes it force_all_reduce, which it does not take: --use-torch-fsdp2, whose class "
        "has no other, ends there with a TypeError after the first backward pass, on any device",
        wrap=_takes_what_it_is_passed,
        versions=">=0.16",
        fingerprints={"0.16.1": "bbb9491c01dc"},
    ),
)
