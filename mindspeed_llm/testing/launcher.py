"""A launcher like torchrun for tests in which processes die: ranks are forked, so a start costs no imports.

    with Launcher() as launcher:
        job = launcher.run(["path/of/script.py", "flag"], ranks=2, restarts=1, log=path)

Like torchrun's agent it keeps one store for all starts, ends the other ranks with SIGTERM when one has failed, gives
them 30 s, and starts all of them again. A script has `main(argv)`, whose result is the exit status.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GRACE_SECONDS = 30.0
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Job:
    """How a command ended.

    Attributes:
        status: 0, or the exit status of the first failing rank of the last start (negative: a signal's number).
        starts: exit status of every rank, for each start.
        seconds: from the first failure to the end of the last start; 0.0 without one.
    """

    status: int
    starts: list[list[int]]
    seconds: float


class Launcher:
    """A process with everything imported, that forks the ranks of jobs."""

    def __enter__(self) -> Launcher:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MINDSPEED_LLM_DEVICE": "cpu"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def __exit__(self, *unused: Any) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def run(
        self,
        command: Sequence[str],
        *,
        ranks: int,
        log: Path,
        restarts: int = 0,
        environment: Mapping[str, str] | None = None,
        send: tuple[float, int] | None = None,
        limit: float = 240.0,
    ) -> Job:
        """Run a script on some ranks.

        Args:
            command: path of the script and its arguments.
            log: file that gets what all ranks print.
            restarts: how often all ranks are started again after a failure.
            send: (seconds, signal) to all ranks that long after the first start.
            limit: seconds until everything is killed.
        """
        told = {
            "command": list(command),
            "ranks": ranks,
            "log": str(log),
            "restarts": restarts,
            "environment": dict(environment or {}),
            "send": send,
            "limit": limit,
        }
        self._process.stdin.write(json.dumps(told) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the launcher ended with {self._process.wait()}")
        return Job(**json.loads(answer))


def _serve() -> None:
    """The life of the launcher's process."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print is no answer
    import torch

    import mindspeed_llm.cli.posttrain
    import mindspeed_llm.cli.pretrain
    import mindspeed_llm.training.run  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        answers.write(json.dumps(vars(_Agent(**json.loads(line)).run())) + "\n")
        answers.flush()


class _Agent:
    """Starts the ranks of one job, as often as it is allowed to."""

    def __init__(self, command, ranks, log, restarts, environment, send, limit) -> None:
        self.command, self.ranks, self.log, self.restarts = command, ranks, log, restarts
        self.environment, self.send, self.deadline = environment, send, time.monotonic() + limit

    def run(self) -> Job:
        port, host = _fork_store()
        starts, failed_at, status = [], None, 0
        try:
            while len(starts) <= self.restarts:
                codes, failed = self._start(port, len(starts))
                starts.append(codes)
                failed_at = failed_at or failed
                status = next((code for code in codes if code), 0)
                if not status or time.monotonic() > self.deadline:
                    break
        finally:
            os.kill(host, signal.SIGKILL)
            os.waitpid(host, 0)
        return Job(status, starts, time.monotonic() - failed_at if failed_at else 0.0)

    def _start(self, port: int, number: int) -> tuple[list[int], float | None]:
        """(exit status of each rank, when the first failed)."""
        pids = [self._fork(rank, port, number) for rank in range(self.ranks)]
        codes: dict[int, int] = {}
        began, failed_at, ends_at = time.monotonic(), None, self.deadline
        send = self.send if number == 0 else None
        while len(codes) < self.ranks:
            for rank in set(range(self.ranks)) - set(codes):
                pid, word = os.waitpid(pids[rank], os.WNOHANG)
                if pid:
                    codes[rank] = os.waitstatus_to_exitcode(word)
            left, now = [pids[rank] for rank in range(self.ranks) if rank not in codes], time.monotonic()
            if send and now - began > send[0]:
                _kill(left, send[1])
                send = None
            if failed_at is None and any(codes.values()):
                failed_at, ends_at = now, min(now + GRACE_SECONDS, self.deadline)
                _kill(left, signal.SIGTERM)
            if now > ends_at:
                _kill(left, signal.SIGKILL)
            time.sleep(_POLL_SECONDS)
        return [codes[rank] for rank in range(self.ranks)], failed_at

    def _fork(self, rank: int, port: int, number: int) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            size = str(self.ranks)
            os.environ.update(self.environment)
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
            os.environ.update(TORCHELASTIC_RESTART_COUNT=str(number))
            code = _call(self.command)
        finally:
            os._exit(code)


def _call(command: Sequence[str]) -> int:
    """The exit status of a script's `main`, after everything that a process does at its end."""
    code: Any = 1
    try:
        spec = importlib.util.spec_from_file_location("door", command[0])
        door = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(door)
        code = door.main(list(command[1:]))
    except SystemExit as left:
        code = left.code
    except BaseException:
        traceback.print_exc()
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else int(code is not None)


def _fork_store() -> tuple[int, int]:
    """(port, process) of a store that outlives the ranks."""
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        import torch.distributed as dist

        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(writes, f"{store.port}\n".encode())
        while os.getppid() != 1:
            time.sleep(1.0)
        os._exit(0)
    with os.fdopen(reads) as answer:
        os.close(writes)
        return int(answer.readline()), pid


def _kill(pids: Sequence[int], number: int) -> None:
    for pid in pids:
        os.kill(pid, number)


if __name__ == "__main__":
    _serve()
