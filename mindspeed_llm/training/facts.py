"""What must be the same on all ranks of a run, so that a host that was started differently is named at once."""

from __future__ import annotations

import hashlib
import json
import os

from mindspeed_llm.config.run import all_options, door_options
from mindspeed_llm.parallel.launch import versions
from mindspeed_llm.plan.plan import Plan

# Options that may differ from host to host: they change where something lies or how fast it is, not what is computed.
OF_THE_HOST = ("cache_dir", "num_threads", "cpu_allocator", "tensorboard_dir", "loss_curve")
OF_THE_HOST += ("metrics_jsonl", "wandb_save_dir", "swanlab_save_dir")


def launch_facts(plan: Plan) -> dict[str, str]:
    """Versions, flags, world size, the model's shape and the checkpoint that is gone on from, by name."""
    options = {
        all_options()[o.name].flags[0]: str(plan.config.get(o.name))
        for o in door_options(plan.config.door)
        if o.name not in OF_THE_HOST
    }
    shape = hashlib.sha256(json.dumps(plan.shape.to_json(), sort_keys=True).encode()).hexdigest()[:12]
    facts = {**versions(), **options, "WORLD_SIZE": os.environ.get("WORLD_SIZE", "1"), "config.json": shape}
    # Hosts may see a shared directory as it was some seconds ago.
    return facts | ({"resumed checkpoint": plan.resume.directory.name} if plan.resume is not None else {})
