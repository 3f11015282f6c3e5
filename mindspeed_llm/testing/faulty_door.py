"""A training door with a fault in it: the script that `testing.faults` starts.

The environment names the fault: FAULT is a function below, FAULT_RANK where it happens, FAULT_AT after which iteration
or at which stage of saving. A fault happens once: FAULT_ONCE names a file that it leaves behind.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

RANK = int(os.environ.get("RANK", "0"))
AT = os.environ.get("FAULT_AT", "")


def first_time() -> bool:
    """Whether the fault has not happened yet; from now on it has."""
    mark = Path(os.environ["FAULT_ONCE"])
    if RANK != int(os.environ["FAULT_RANK"]) or mark.exists():
        return False
    mark.touch()
    return True


def in_iteration(act) -> None:
    """Do it in the middle of the iteration after AT, when its micro-batches are asked for."""
    from mindspeed_llm.training.loop import TrainingLoop

    step = TrainingLoop.step

    def faulty(self):
        if self.progress.iteration == int(AT) and first_time():
            batches = self.data.micro_batches

            def then(*args):
                act()
                return batches(*args)

            self.data.micro_batches = then
        return step(self)

    TrainingLoop.step = faulty


def kill() -> None:
    """This process ends at once, as by the kernel's out-of-memory killer."""
    in_iteration(lambda: os.kill(os.getpid(), signal.SIGKILL))


def raises() -> None:
    """This rank raises."""

    def act():
        print("reading shard 7", flush=True)
        raise OSError("storage is gone")

    in_iteration(act)


def sleeps() -> None:
    """This rank does not come back."""

    def held_up_by_storage():
        time.sleep(600)

    in_iteration(held_up_by_storage)


def asked_to_stop() -> None:
    """This rank, alone, is sent a signal."""
    in_iteration(lambda: os.kill(os.getpid(), getattr(signal, os.environ["FAULT_SIGNAL"])))


def kill_in_update() -> None:
    """This process ends while its weights are between two iterations."""
    from mindspeed_llm.training.standing import Standing

    before = Standing.before_update

    def faulty(self, loop):
        before(self, loop)
        if loop.progress.iteration == int(AT) and first_time():
            os.kill(os.getpid(), signal.SIGKILL)

    Standing.before_update = faulty


def kill_before_update() -> None:
    """This process ends when the others know all gradients and go on."""
    from mindspeed_llm.training.standing import Standing

    before = Standing.before_update

    def faulty(self, loop):
        if loop.progress.iteration == int(AT) and first_time():
            os.kill(os.getpid(), signal.SIGKILL)
        before(self, loop)

    Standing.before_update = faulty


def at_stage(act) -> None:
    """Do it at a stage of a save; "written:2" is the second time that this rank passes it."""
    from mindspeed_llm.checkpoint import directory

    wanted, _, times = AT.partition(":")
    passed = []

    def observe(stage):
        passed.append(stage)
        if stage == wanted and passed.count(stage) == int(times or 1) and first_time():
            act()

    directory.observers.append(observe)


def kill_in_save() -> None:
    """This process ends at a stage of saving."""
    at_stage(lambda: os.kill(os.getpid(), signal.SIGKILL))


def full_disk() -> None:
    """The disk takes no more than the checkpoint before, though there seemed to be room."""
    from mindspeed_llm.training import saving

    saving.space_problem = lambda *unused: None


def file_limit() -> None:
    """The disk refuses to write at a stage of saving (EFBIG for want of a volume that can be filled)."""
    import resource

    full_disk()
    at_stage(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))


def main(argv: list[str]) -> int:
    """Open the door named first with the fault in place."""
    fault, (door, *words) = os.environ.get("FAULT"), argv
    if fault:
        globals()[fault]()
    from importlib import import_module

    return import_module(f"mindspeed_llm.cli.{door}").main(words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
