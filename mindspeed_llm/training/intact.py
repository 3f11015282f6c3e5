"""Checksums of what a run loads, before anything of it is used; what was changed is passed over for an older one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch.distributed as dist

from mindspeed_llm.checkpoint.detect import Found
from mindspeed_llm.checkpoint.directory import find_newest
from mindspeed_llm.checkpoint.manifest import changed_file, damage, has_manifest, read_manifest
from mindspeed_llm.checkpoint.train_record import read_record
from mindspeed_llm.errors import UserError
from mindspeed_llm.plan.plan import Plan
from mindspeed_llm.training.setup import is_leader

# What the records of one run's checkpoints have in common; with another value the plan would be another.
SAME_IN_ONE_RUN = ("adapters", "base", "continuity", "data", "dtype", "resumable", "shape")


def with_intact_checkpoint(plan: Plan) -> Plan:
    """The plan, with the newest checkpoint of the run whose files are as they were written. All ranks together.

    Only the checkpoint that a run goes on from has a substitute; weights to start from, and an iteration that was
    asked for by its number, are refused when they were changed.

    Raises:
        UserError: a file was changed and there is nothing to take instead.
    """
    if plan.config.checkpoint.verify_checkpoint not in ("load", "both"):
        return plan
    changed: dict[Path, str] = {}
    while True:
        directories = {found.directory for found in (plan.weights, plan.adapter_source) if found is not None}
        wrong = {directory: _changed(directory) for directory in sorted(directories) if has_manifest(directory)}
        changed |= {directory: why for directory, why in wrong.items() if why is not None}
        if not any(wrong.values()):
            return plan
        if is_leader():
            for directory, why in wrong.items():
                if why is not None:
                    print(f"warning: {directory} is damaged: {why}", flush=True)
        plan = _with_older(plan, changed)


def _changed(directory: Path) -> str | None:
    """What any rank found changed; each looks at a share of the files."""
    names = sorted(read_manifest(directory))[dist.get_rank() :: dist.get_world_size()]
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, changed_file(directory, names))
    return next((why for why in found if why is not None), None)


def _with_older(plan: Plan, changed: dict[Path, str]) -> Plan:
    """The plan with the newest checkpoint of the same run that is not among the changed ones."""
    resumed = plan.resume
    if resumed is not None and resumed.directory in changed and plan.config.checkpoint.ckpt_step is None:

        def wrong(directory: Path) -> str | None:
            return changed.get(directory) or damage(directory) or _other_run(directory, resumed)

        older = find_newest(resumed.path, plan.config.checkpoint.load_healthy, wrong=wrong)
        if older is not None:
            return _replaced(plan, older)
    directory, why = next(iter(changed.items()))
    raise UserError(
        f"checkpoint: {directory} is damaged, because {why}; no other checkpoint takes its place; "
        "try: --ckpt-step N, or --verify-checkpoint off to load it as it is"
    )


def _other_run(directory: Path, resumed: Found) -> str | None:
    record = read_record(directory)
    differing = [name for name in SAME_IN_ONE_RUN if record.get(name) != resumed.record.get(name)]
    return f"has another {differing[0]}" if differing else None


def _replaced(plan: Plan, directory: Path) -> Plan:
    resumed, record = plan.resume, read_record(directory)
    older = dataclasses.replace(resumed, directory=directory, iteration=record["iteration"], record=record)
    if is_leader():
        print(f"warning: resuming from {directory} instead of {resumed.directory.name}", flush=True)
    return dataclasses.replace(
        plan,
        resume=older,
        weights=older if plan.weights is resumed else plan.weights,
        adapter_source=older if plan.adapter_source is resumed else plan.adapter_source,
    )
