"""Pools of gloo processes that live as long as the test session: one start-up for many distributed tests.

    results = pool(2).run(function, *args)      # [function(*args) on rank 0, ... on rank 1]

The function is sent by its file and name, so it must stand at the top level of a file, a test module included; its
arguments and results are pickled. Each process runs one thread and has joined the default process group.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import importlib.util
import inspect
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

# After one rank has failed the others usually fail too or hang in a collective; this long is waited for them.
GRACE_SECONDS = 2.0


class Pool:
    """`world_size` processes, started at the first `run` and again after a failure left them unusable."""

    def __init__(self, world_size: int, join: Callable[[int, int, str], None] | None = None):
        self.world_size = world_size
        self._join = _address(join or join_on_cpu)
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._pipes: list[Connection] = []
        self._resting = True

    def run(self, function: Callable, *args: Any, timeout: float = 120.0) -> list[Any]:
        """Call `function(*args)` on every rank.

        Args:
            function: a top-level function of a file.
            args: pickled and sent to every rank.
            timeout: seconds until the ranks that have not answered are given up.

        Returns:
            The results in rank order.

        Raises:
            Exception: what the first failing rank raised, with a note naming the rank and its traceback. Unless every
                rank has answered the processes are ended then, and the next `run` starts new ones.
            TimeoutError: naming the ranks that did not answer.
        """
        path, name = _address(function)
        _rest_all_but(self)
        if not self._processes:
            self._start()
        message = pickle.dumps((path, name, args))
        self._resting = False
        for pipe in self._pipes:
            pipe.send_bytes(message)
        results, failure = self._collect(timeout)
        if len(results) < self.world_size:  # some rank hangs in a collective or is gone
            self.close()
        if failure is not None:
            raise failure
        return [results[rank] for rank in range(self.world_size)]

    def rest(self) -> None:
        """Let the processes end their parallel state: the threads of its gloo groups take time even when idle."""
        if not self._resting:
            for pipe in self._pipes:
                pipe.send_bytes(pickle.dumps(None))
            self._resting = True

    def close(self) -> None:
        """End the processes: those that wait for work leave by themselves, which ends their own helpers too."""
        for pipe in self._pipes:
            pipe.close()
        deadline = time.monotonic() + GRACE_SECONDS
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.join()
        self._processes, self._pipes, self._resting = [], [], True

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        store = f"{tempfile.gettempdir()}/mindspeed-pool-{os.getpid()}-{self.world_size}-{time.monotonic_ns()}"
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            # Not daemons: the asynchronous checkpoint writer starts processes of its own.
            process = context.Process(target=_serve, args=(theirs, self._join, rank, self.world_size, store))
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def _collect(self, timeout: float) -> tuple[dict[int, Any], BaseException | None]:
        results: dict[int, Any] = {}
        failure: BaseException | None = None
        pending = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        deadline = time.monotonic() + timeout
        while pending:
            ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                return results, failure or TimeoutError(
                    f"ranks {sorted(pending.values())} gave no answer in {timeout} s"
                )
            for pipe in ready:
                rank = pending.pop(pipe)
                error, value, alive = _receive(pipe, rank)
                if alive:
                    results[rank] = value
                if error is not None and failure is None:
                    failure = error
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        return results, failure


_pools: weakref.WeakSet[Pool] = weakref.WeakSet()


def _rest_all_but(active: Pool) -> None:
    for other in _pools:
        if other is not active:
            other.rest()
    _pools.add(active)


@functools.cache
def pool(world_size: int, join: Callable[[int, int, str], None] | None = None) -> Pool:
    """The session's pool of that size.

    Args:
        join: top-level function called first in every process with rank, world size and the path of a file to meet at;
            it joins the default process group. None for gloo on the CPU.
    """
    made = Pool(world_size, join)
    atexit.register(made.close)
    return made


def _address(function: Callable) -> tuple[str, str]:
    name = function.__qualname__
    if "." in name or "<" in name:
        raise ValueError(f"{name} cannot be sent to another process: it must stand at the top level of a file")
    if function.__module__.startswith("mindspeed_llm."):  # importable there too, and what it returns can be pickled
        return function.__module__, name
    return inspect.getsourcefile(function), name


def _receive(pipe: Connection, rank: int) -> tuple[BaseException | None, Any, bool]:
    """What a rank raised, or returned, and whether it lives."""
    try:
        ok, value, trace = pickle.loads(pipe.recv_bytes())
    except EOFError:
        return RuntimeError(f"rank {rank} died without an answer"), None, False
    if ok:
        return None, value, True
    value.add_note(f"on rank {rank}:\n{trace}")
    return value, None, True


@functools.cache
def _load(path: str) -> Any:
    if not path.endswith(".py"):
        return importlib.import_module(path)
    name = f"_pool_{os.path.basename(path).removesuffix('.py')}_{abs(hash(path))}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _answer(function_address: tuple[str, str], args: tuple) -> bytes:
    path, name = function_address
    try:
        return pickle.dumps((True, getattr(_load(path), name)(*args), ""))
    except BaseException as error:
        trace = traceback.format_exc()
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            error = RuntimeError(f"{type(error).__name__}: {error}")
        return pickle.dumps((False, error, trace))


def join_on_cpu(rank: int, world_size: int, store: str) -> None:
    """Join a gloo group with the CPU as device."""
    import torch.distributed as dist

    os.environ["MINDSPEED_LLM_DEVICE"] = "cpu"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)


def _serve(pipe: Connection, join: tuple[str, str], rank: int, world_size: int, store: str) -> None:
    """The life of one process: join the group, then answer until the parent is gone."""
    import torch

    torch.set_num_threads(1)
    join_path, join_name = join
    getattr(_load(join_path), join_name)(rank, world_size, store)
    while True:
        try:
            message = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        if message is None:
            _release_groups()
            continue
        path, name, args = message
        pipe.send_bytes(_answer((path, name), args))


def _release_groups() -> None:
    if "mindspeed_llm.parallel.setup" in sys.modules:
        sys.modules["mindspeed_llm.parallel.setup"].release_groups()
