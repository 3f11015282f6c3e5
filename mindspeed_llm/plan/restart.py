"""The same command line started again: whether `--save` holds this very run, which then goes on from there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspeed_llm.checkpoint.detect import Found
from mindspeed_llm.config.checkpoint import CheckpointConfig
from mindspeed_llm.config.run import RunConfig
from mindspeed_llm.errors import UserError
from mindspeed_llm.plan.source import find_source

if TYPE_CHECKING:
    from mindspeed_llm.plan.plan import Plan

# torchrun counts in it how often it has started the workers again.
RESTART_COUNT = "TORCHELASTIC_RESTART_COUNT"


def start_of(config: RunConfig) -> dict[str, Any]:
    """What a command line begins with, as checkpoints record it."""
    c, adapters = config.checkpoint, config.lora.lora_load
    return {
        "load": str(Path(c.load).resolve()) if c.load is not None else None,
        "step": c.ckpt_step,
        "lora_load": str(Path(adapters[0]).resolve()) if adapters else None,
        "finetune": c.finetune,
    }


def started_from(plan: Plan) -> dict[str, Any]:
    """What the run began with that this one goes on with."""
    c, resumed = plan.config.checkpoint, plan.resume
    goes_on = resumed is not None and _same(c.save, resumed.path) and not (c.ckpt_step is not None and in_place(c))
    return (resumed.record.get("started_from") if goes_on else None) or start_of(plan.config)


def in_place(c: CheckpointConfig) -> bool:
    """Whether a run goes on in the directory that it loads."""
    return c.load is not None and _same(c.save, c.load)


def _same(one: str | Path | None, other: str | Path) -> bool:
    return one is not None and Path(one).resolve() == Path(other).resolve()


def restarting(config: RunConfig) -> bool:
    """Whether a checkpoint in `--save` is to be gone on from."""
    c = config.checkpoint
    return c.save is not None and (c.auto_resume or int(os.environ.get(RESTART_COUNT, "0")) > 0)


def find_restart(config: RunConfig) -> Found | None:
    """The checkpoint in `--save` that a command line which has run before goes on from; None at its first start.

    Raises:
        UserError: what is there cannot be resumed, or is of a run that began with something else.
    """
    c = config.checkpoint
    if not restarting(config):
        return None
    found = find_source(c.save, fall_back=True, healthy=c.load_healthy)
    if found is None:
        return None
    began, begins = found.record.get("started_from"), start_of(config)
    if began == begins:
        return found
    if in_place(c):
        return None
    name = next(name for name in begins if (began or {}).get(name) != begins[name])
    raise UserError(
        f"resume: {found.directory} is not of this run, because that one began with {name} "
        f"{(began or {}).get(name, 'unknown')} and this one begins with {begins[name]}; "
        f"try: --load {c.save} to go on from it, or another --save"
    )
