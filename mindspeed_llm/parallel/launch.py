"""What must be true of the processes of a run before a model is built: enough devices, and all of them the same run."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version

import torch
import torch.distributed as dist

from mindspeed_llm import __version__, accelerator
from mindspeed_llm.errors import UserError

# Differing items named in one line; the rest is counted.
MOST_NAMED = 3


def check_devices() -> None:
    """Refuse more processes on this host than it has devices (a CPU serves any number).

    Raises:
        UserError: `--nproc-per-node` is too large, or LOCAL_RANK points past the devices.
    """
    device = accelerator.current()
    if device.device_type == "cpu":
        return
    count, processes = device.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if max(processes, int(os.environ.get("LOCAL_RANK", "0")) + 1) > count:
        raise UserError(
            f"launch: --nproc-per-node {processes} is wrong, because {socket.gethostname()} has {count} "
            f"{device.name} device(s) for this process to see; legal: 1..{count}; try: more hosts (--nnodes), or check "
            "the list of visible devices"
        )


def versions() -> dict[str, str]:
    """Versions of what computes: they must be the same on all ranks."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "megatron-core": version("megatron-core"),
        "mindspeed-llm": __version__,
        "device": accelerator.current().name,
    }


def check_agreement(facts: Mapping[str, str], what: str) -> None:
    """Refuse to run with ranks that were started differently.

    A digest is compared first, so that a run of any size pays for one small collective; the facts themselves travel
    only when the digests differ.

    Args:
        facts: name -> value, of this rank; all ranks must give the same.
        what: what they are, for the message.

    Raises:
        UserError: on every rank, naming the odd ranks with their hosts, and what differs.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest()[:8]
    mine = torch.frombuffer(bytearray(digest), dtype=torch.int64).to(accelerator.current().current_device())
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    if all(torch.equal(other, everyone[0]) for other in everyone):
        return
    stories: list = [None] * dist.get_world_size()
    dist.all_gather_object(stories, (socket.gethostname(), dict(facts)))
    raise UserError(disagreement(stories, what))


def disagreement(stories: Sequence[tuple[str, Mapping[str, str]]], what: str) -> str:
    """One line about ranks that differ from the most common story.

    Args:
        stories: (host, facts) of each rank, not all with the same facts.
    """
    spelled = [json.dumps(facts, sort_keys=True) for _, facts in stories]
    usual = json.loads(Counter(spelled).most_common(1)[0][0])
    odd = [rank for rank, (_, facts) in enumerate(stories) if facts != usual]
    first = stories[odd[0]][1]
    items = [
        f"{name} is {first.get(name, 'missing')} there and {usual.get(name, 'missing')} elsewhere"
        for name in sorted(usual.keys() | first.keys())
        if first.get(name) != usual.get(name)
    ]
    more = f" and {len(items) - MOST_NAMED} more" if len(items) > MOST_NAMED else ""
    ranks = ", ".join(f"{rank} ({stories[rank][0]})" for rank in odd[:8]) + (", ..." if len(odd) > 8 else "")
    return (
        f"launch: rank {ranks} was started with other {what}, because {'; '.join(items[:MOST_NAMED])}{more}; "
        "legal: the same on every rank"
    )
