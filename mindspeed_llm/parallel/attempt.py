"""A part of the launcher's store that belongs to this start of the ranks alone.

torchrun keeps one store for all starts of a job (`DynamicRendezvousHandler._bootstrap_store_info`, torch 2.13), and
nothing in the environment tells starts apart: each node counts its own restarts. Addresses that ranks of an earlier
start left there are taken for those of living ones. So the first rank draws a name for this start, and tells it to
those who show with a fresh word that they live.
"""

from __future__ import annotations

import time
import uuid
from typing import Any

import torch.distributed as dist

_POLL_SECONDS = 0.05


def store_of_attempt(store: Any, rank: int, world_size: int, timeout_seconds: float) -> Any:
    """The store under a name that only the ranks of this start know.

    Raises:
        TimeoutError: ranks did not come; the message names them.
    """
    deadline = time.monotonic() + timeout_seconds
    if rank == 0:
        return _invite(store, world_size, deadline)
    word = uuid.uuid4().hex
    store.set(f"attempt/asks/{rank}", word)
    while not store.check([f"attempt/answer/{word}"]):
        if time.monotonic() > deadline:
            raise TimeoutError(f"launch: rank 0 has not answered in {timeout_seconds:.0f} s; the store is {store}")
        time.sleep(_POLL_SECONDS)
    name = store.get(f"attempt/answer/{word}").decode()
    store.set(f"{name}/came/{rank}", "")
    return dist.PrefixStore(name, store)


def _invite(store: Any, world_size: int, deadline: float) -> Any:
    """Answer whoever asks, those of earlier starts too, until all have come."""
    name, missing, answered = f"attempt/{uuid.uuid4().hex}", set(range(1, world_size)), set()
    while missing:
        for rank in sorted(missing):
            if store.check([f"{name}/came/{rank}"]):
                missing.discard(rank)
            elif store.check([f"attempt/asks/{rank}"]) and (word := store.get(f"attempt/asks/{rank}")) not in answered:
                answered.add(word)
                store.set(f"attempt/answer/{word.decode()}", name)
        if missing and time.monotonic() > deadline:
            raise TimeoutError(f"launch: ranks {sorted(missing)[:8]} have not come in time")
        time.sleep(_POLL_SECONDS if missing else 0.0)
    return dist.PrefixStore(name, store)
