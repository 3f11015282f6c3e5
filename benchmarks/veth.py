"""Two network namespaces joined by a virtual cable whose rate can be set: communication made visible on one host.

    with Cable() as cable:
        processes = [subprocess.Popen([*cable.inside(side), ...]) for side in (0, 1)]

Needs root, `ip` and `tc` (iproute2) and the kernel's token bucket (sch_tbf).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

ADDRESSES = ("10.203.77.1", "10.203.77.2")

# Bytes that may pass at once: one segment as large as the kernel makes them, and a little.
BURST = 128 * 1024


class Cable:
    """Namespaces and cable exist inside the `with`."""

    device = "wire"

    def __init__(self) -> None:
        self.names = [f"lora-fusion-{os.getpid()}-{side}" for side in (0, 1)]

    def __enter__(self) -> Cable:
        try:
            self._lay()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)

    def _lay(self) -> None:
        first, second = self.names
        for name in self.names:
            _run("ip", "netns", "add", name)
        _run("ip", "-n", first, "link", "add", self.device, "type", "veth", "peer", self.device, "netns", second)
        for name, address in zip(self.names, ADDRESSES):
            _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", self.device)
            for device in ("lo", self.device):
                _run("ip", "-n", name, "link", "set", device, "up")

    def inside(self, side: int) -> list[str]:
        """Words in front of a command that is to run on one side."""
        return ["ip", "netns", "exec", self.names[side]]


def limit_rate(megabits_per_second: float | None) -> None:
    """Let this side send no faster; to be called by a process inside. None takes the limit off."""
    subprocess.run(["tc", "qdisc", "delete", "dev", Cable.device, "root"], capture_output=True, check=False)
    if megabits_per_second is not None:
        _run(*_limit(megabits_per_second))


def _limit(megabits_per_second: float) -> list[str]:
    return f"tc qdisc add dev {Cable.device} root tbf rate {megabits_per_second}mbit burst {BURST} latency 2s".split()


def output_of_first(name: str) -> str:
    """Run this program once on each side with `--worker SIDE`; what the first one printed.

    Args:
        name: of the benchmark, for messages.

    Raises:
        SystemExit: there can be no cable here, or a side failed.
    """
    if not is_possible():
        sys.exit(f"{name}: network namespaces with a cable cannot be made here; legal: root with `ip` and `tc`")
    words = [sys.executable, "-W", "ignore", *sys.argv]
    with Cable() as cable:
        processes = [
            subprocess.Popen([*cable.inside(side), *words, "--worker", str(side)], stdout=subprocess.PIPE, text=True)
            for side in range(len(ADDRESSES))
        ]
        outputs = [process.communicate()[0] for process in processes]
        if any(process.returncode for process in processes):
            sys.exit(f"{name}: a rank failed")
    return outputs[0]


def is_possible() -> bool:
    """Whether a cable of a set rate can be had, which is tried: root may lack the right, or the kernel the bucket."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "tc"))):
        return False
    try:
        with Cable() as cable:
            _run(*cable.inside(0), *_limit(1.0))
    except subprocess.CalledProcessError:
        return False
    return True


def _run(*words: str) -> None:
    subprocess.run(words, check=True)
