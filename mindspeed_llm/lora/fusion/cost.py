"""Time of a tensor-parallel product with its collective, from a graph of tasks: what the chunks are chosen by.

A pass of an adapted linear is one of three forms (t ranks; the r-wide tensor of the adapter goes with the wide one):

    gather    y = AG(x) W^T       column forward, row backward, under sequence parallelism
    scatter   y = RS(x W^T)       row forward, column backward, under sequence parallelism
    reduce    y = AR(x W^T)       row forward, column backward, without

Tasks occupy the processor or the link, one at a time and in the order in which they are issued, so the time of a pass
is the longest path through dependencies and issue order. Torch-free: the benchmark draws its predictions from here,
and `choose` is what the running layer asks. Derivation: docs/lora-fusion.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

FORMS = ("gather", "scatter", "reduce")

# Numbers of chunks that are considered.
CHUNKS = (1, 2, 4, 8)

# How tasks begin that sending takes from the processor.
HANDLE = "handle "

# More chunks must be worth this share of the time: measured rates are known to a few per cent.
WORTH = 0.02


@dataclass(frozen=True)
class Link:
    """Time of a collective: latency [s] + bytes / bandwidth [bytes/s], of the whole (gathered or summed) tensor.

    What sends may take the processor from the products: `handling` [s] of every collective, and
    `handling_per_byte` [s] of every byte. Nothing, where a device multiplies.
    """

    latency: float
    bandwidth: float
    handling: float = 0.0
    handling_per_byte: float = 0.0

    def seconds(self, size: float) -> float:
        """For a tensor of `size` bytes."""
        return self.latency + size / self.bandwidth

    def processor(self, size: float) -> float:
        """Seconds that a tensor of `size` bytes takes from the products."""
        return self.handling + size * self.handling_per_byte


@dataclass(frozen=True)
class Rates:
    """What processor and links reach.

    Args:
        flops: FLOP/s of a large matrix product on one rank.
        launch: seconds that a product takes however small it is.
        gather, scatter, reduce: the link under each collective.
    """

    flops: float
    launch: float
    gather: Link
    scatter: Link
    reduce: Link

    def link(self, form: str) -> Link:
        """The link under the collective of a form."""
        return getattr(self, form)


@dataclass(frozen=True)
class Pass:
    """One pass of one linear on one rank.

    Args:
        form: of FORMS.
        rows: tokens of the whole sequence times batch.
        inner, outer: sizes of the product on this rank: [rows, inner] x [inner, outer].
        rank: width of the adapter.
        world: tensor-parallel ranks.
        itemsize: bytes of a number.
    """

    form: str
    rows: int
    inner: int
    outer: int
    rank: int
    world: int
    itemsize: int

    @property
    def wide(self) -> int:
        """Width of what is sent for the base."""
        return self.inner if self.form == "gather" else self.outer


@dataclass(frozen=True)
class Schedule:
    """How a pass is run.

    Args:
        chunks: of the sequence; the collective of one runs beside the product of another.
        merge: the adapter's tensor rides in the first chunk's message; otherwise it has a collective of its own.
    """

    chunks: int = 1
    merge: bool = True


@dataclass(frozen=True)
class Task:
    """Work of `seconds` on a resource ("compute" or "link"), startable when the tasks named in `after` are done."""

    name: str
    resource: str
    seconds: float
    after: tuple[str, ...] = ()


def finish_times(tasks: Iterable[Task]) -> dict[str, float]:
    """When each task ends, each resource taking its tasks in the order given."""
    ends: dict[str, float] = {}
    free = {"compute": 0.0, "link": 0.0}
    for task in tasks:
        begin = max([free[task.resource], *(ends[name] for name in task.after)])
        ends[task.name] = free[task.resource] = begin + task.seconds
    return ends


def seconds(tasks: Sequence[Task]) -> float:
    """When all are done."""
    return max(finish_times(tasks).values(), default=0.0)


def critical_path(tasks: Sequence[Task]) -> list[Task]:
    """The tasks that follow one another without a gap up to the end, first one first."""
    ends = finish_times(tasks)
    before: dict[str, list[str]] = {}
    last: dict[str, str] = {}
    for task in tasks:
        before[task.name] = [*task.after, *([last[task.resource]] if task.resource in last else [])]
        last[task.resource] = task.name
    by_name = {task.name: task for task in tasks}
    path = [max(by_name, key=ends.__getitem__)]
    while before[path[-1]]:
        path.append(max(before[path[-1]], key=ends.__getitem__))
    return [by_name[name] for name in reversed(path)]


def busy(tasks: Iterable[Task], resource: str) -> float:
    """Seconds of work on one resource."""
    return sum(task.seconds for task in tasks if task.resource == resource)


def exposed(tasks: Sequence[Task]) -> float:
    """Seconds beyond those of the products: what is sent and hides behind nothing, and what sending takes from them."""
    products = [task for task in tasks if not task.name.startswith(HANDLE)]
    return seconds(tasks) - busy(products, "compute")


def product_seconds(rates: Rates, rows: float, inner: int, outer: int, launches: int = 1) -> float:
    """Of [rows, inner] x [inner, outer] in `launches` products."""
    return launches * rates.launch + 2.0 * rows * inner * outer / rates.flops


def fused_tasks(p: Pass, rates: Rates, schedule: Schedule) -> list[Task]:
    """Tasks of a pass as lora/fusion/products.py issues them, the adapter's two products included."""
    down_rows = p.rows / p.world if p.form == "gather" else p.rows
    up_rows = p.rows / p.world if p.form == "scatter" else p.rows
    down = Task("down", "compute", product_seconds(rates, down_rows, p.inner, p.rank))
    body = {"gather": _gather, "scatter": _scatter, "reduce": _reduce}[p.form](p, rates, schedule)
    last = tuple(task.name for task in body)
    return [down, *body, Task("up", "compute", product_seconds(rates, up_rows, p.rank, p.outer), last)]


def _sending(p: Pass, rates: Rates, schedule: Schedule) -> Callable[..., list[Task]]:
    """send(chunk or "narrow", *after) -> its tasks on link and processor, the second where sending takes any of it."""
    link, c = rates.link(p.form), schedule.chunks
    wide, narrow = p.rows / c * p.wide * p.itemsize, p.rows * p.rank * p.itemsize

    def send(part: int | str, *after: str) -> list[Task]:
        size = narrow if part == "narrow" else wide + narrow * (schedule.merge and part == 0)
        tasks = [Task(f"send {part}", "link", link.seconds(size), after)]
        if taken := link.processor(size):
            tasks.append(Task(f"{HANDLE}{part}", "compute", taken, after))
        return tasks

    return send


def _gather(p: Pass, rates: Rates, schedule: Schedule) -> list[Task]:
    c, t = schedule.chunks, p.world
    send = _sending(p, rates, schedule)
    tasks = send(0, "down")
    if not schedule.merge:
        tasks += send("narrow", "down")
    for k in range(c):
        tasks.append(Task(f"own {k}", "compute", product_seconds(rates, p.rows / t / c, p.inner, p.outer)))
        if k + 1 < c:
            tasks += send(k + 1)
        others = product_seconds(rates, p.rows * (t - 1) / t / c, p.inner, p.outer, launches=t - 1)
        tasks.append(Task(f"others {k}", "compute", others, (f"send {k}",)))
    return tasks


def _scatter(p: Pass, rates: Rates, schedule: Schedule) -> list[Task]:
    c, t = schedule.chunks, p.world
    send = _sending(p, rates, schedule)
    tasks = [] if schedule.merge else send("narrow", "down")
    for k in range(c):
        others = product_seconds(rates, p.rows * (t - 1) / t / c, p.inner, p.outer, launches=t - 1)
        tasks.append(Task(f"others {k}", "compute", others))
        tasks += send(k, f"others {k}")
    return [*tasks, Task("own", "compute", product_seconds(rates, p.rows / t, p.inner, p.outer))]


def _reduce(p: Pass, rates: Rates, schedule: Schedule) -> list[Task]:
    c = schedule.chunks
    send = _sending(p, rates, schedule)
    tasks = [] if schedule.merge else send("narrow", "down")
    for k in range(c):
        tasks.append(Task(f"product {k}", "compute", product_seconds(rates, p.rows / c, p.inner, p.outer)))
        tasks += send(k, f"product {k}")
    return tasks


@functools.lru_cache(maxsize=4096)
def choose(p: Pass, rates: Rates) -> Schedule:
    """The schedule with the shortest time; fewer chunks, and one message rather than two, unless others pay."""
    best, least = None, float("inf")
    for chunks in CHUNKS:
        for merge in (True, False):
            schedule = Schedule(chunks, merge)
            time = seconds(fused_tasks(p, rates, schedule))
            if best is None or time < least * (1 - WORTH):
                best, least = schedule, time
    return best
