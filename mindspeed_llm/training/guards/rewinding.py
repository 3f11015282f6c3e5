"""The checkpoint that a run goes back to when its numbers went wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from mindspeed_llm.checkpoint.detect import Found
from mindspeed_llm.checkpoint.directory import find_newest
from mindspeed_llm.checkpoint.train_record import iteration_directory, read_record, write_tracker
from mindspeed_llm.errors import UserError
from mindspeed_llm.plan.plan import Plan
from mindspeed_llm.training.setup import is_leader


def plan_of_rewind(plan: Plan) -> Plan:
    """The plan that resumes the newest healthy checkpoint of `--save`, everything of it; collective.

    The tracker names that checkpoint from now on: what was saved after it belongs to a course that is given up.

    Raises:
        UserError: there is none.
    """
    root, passed = Path(plan.config.checkpoint.save), []
    found = [find_newest(root, healthy=True, skipped=passed) if is_leader() else None]
    iterations = [int(read_record(found[0])["iteration"]) if found[0] is not None else None]
    dist.broadcast_object_list(iterations, src=0)
    (iteration,) = iterations
    if iteration is None:
        why = f" ({'; '.join(passed)})" if passed else ""
        raise UserError(
            f"rewind: {root} has no healthy checkpoint to go back to{why}; legal: one saved before the trouble; try: "
            "a smaller --save-interval"
        )
    if is_leader():
        write_tracker(root, iteration)
    directory = iteration_directory(root, iteration)
    source = Found("torch_dist", root, directory, iteration, read_record(directory))
    everything = replace(plan.config.checkpoint, no_load_optim=False, no_load_rng=False)
    return replace(plan, resume=source, config=replace(plan.config, checkpoint=everything))
