"""One network device for all gloo groups of a process.

torch gives each gloo group a device of its own, whose thread wakes a hundred times a second whether or not the group is
used: about 1 ms of a core per second and group (measured, torch 2.13). megatron makes some fifty groups per process,
and lets go of them without destroying them, so that eight processes on one host that change their layout a few times
are busy with that alone. A device serves any number of groups.

Two groups that are made in the same call of a program, each by its own ranks, have one name to torch, which wants every
rank to make every group. gloo's ranks look each other up under that name at once, nccl's when they first send: programs
that never use such a group run with nccl. Here ranks look each other up under the members' numbers as well.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.distributed import distributed_c10d

_lock = threading.RLock()
# By process: threads do not survive a fork.
_devices: dict[int, list[Any]] = {}


def _devices_of_process() -> list[Any]:
    """The devices that torch would make for a group: one per interface that GLOO_SOCKET_IFNAME names."""
    gloo, process = torch.distributed.ProcessGroupGloo, os.getpid()
    if process not in _devices:
        interfaces = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
        made = [gloo.create_device(interface=name) for name in interfaces]
        _devices[process] = made or [gloo.create_default_device()]
    return _devices[process]


def _group_class(ranks: Sequence[int] | None) -> type:
    gloo = torch.distributed.ProcessGroupGloo

    class GlooOnSharedDevice(gloo):
        """torch's gloo group, on the devices of this process."""

        def __init__(self, store: Any, rank: int, size: int, timeout: datetime.timedelta):
            options = gloo._Options()
            options._devices, options._timeout = _devices_of_process(), timeout
            # Torch has two workers a device; a rank alone waits for nobody, and megatron makes many groups of one.
            options._threads = (1 if size == 1 else 2) * len(options._devices)
            if ranks is not None:
                store = torch.distributed.PrefixStore("-".join(map(str, sorted(ranks))), store)
            super().__init__(store, rank, size, options)

    return GlooOnSharedDevice


@contextlib.contextmanager
def shared(ranks: Sequence[int] | None = None) -> Iterator[None]:
    """Within it, torch.distributed makes gloo groups on one device; it has no argument for that.

    Args:
        ranks: members of the one group that is made, where they are known.
    """
    if not torch.distributed.is_gloo_available():
        yield
        return
    with _lock:
        plain = distributed_c10d.ProcessGroupGloo
        distributed_c10d.ProcessGroupGloo = _group_class(ranks)
        try:
            yield
        finally:
            distributed_c10d.ProcessGroupGloo = plain
